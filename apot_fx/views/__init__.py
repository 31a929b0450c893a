"""Looking at a stage: ``explain`` (what is quantized how, and why not) and ``summary`` (sizes)."""

from .explain import explain
from .summary import stored_bytes, summary

__all__ = ["explain", "stored_bytes", "summary"]
