"""The main job on real data: handwritten digits, two small networks, every step to parity."""

from .run import run

__all__ = ["run"]
