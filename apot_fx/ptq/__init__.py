"""Post-training methods: what improves a calibrated model without training it.

``rounding`` is AdaRound's maths, ``soft`` a weight between its levels; ``weights`` says what can be
learned, ``blocks`` and ``units`` what is learned at once; ``shelf`` and ``samples`` hold what units
got, ``capture`` runs the model for it; ``checkpoint`` keeps what was learned and ``origin`` what
that depends on; ``learn`` and ``run`` do the rest.
"""

from .run import adaround

__all__ = ["adaround"]
