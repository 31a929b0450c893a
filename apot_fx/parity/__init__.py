"""Parity: a prepared stage against its converted one, node by node, in bits.

``check`` is the entry. ``stored`` recomputes what convert stores, ``record`` runs both stages and
compares the values of common provenance, ``verdict`` is the result; ``check`` composes them.
"""

from .check import check
from .verdict import Finding, Verdict

__all__ = ["Finding", "Verdict", "check"]
