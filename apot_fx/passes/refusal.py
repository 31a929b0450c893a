"""What tracing raises where a forward can't be followed, also when the forward catches it."""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import TraceError


class Untraceable(TraceError):
    """A forward does what no graph can hold; the message says what.

    ``latest``: how many were made, and the last one's message, since a forward's own ``except`` may
    keep it from us. (Not the exception: it would hold frames, and these hold weights.)
    """

    latest: ClassVar[tuple[int, str]] = (0, "")
    #: Where a number was last asked for, and ``latest`` before that.
    asked: ClassVar[tuple[Any, tuple[int, str]]] = (None, latest)

    def __init__(self, message: str) -> None:
        super().__init__(message)
        Untraceable.latest = Untraceable.latest[0] + 1, message

    @classmethod
    def asking(cls, caller: Any) -> None:
        """A number is asked for: by Python code, or by torch's C code, which tries all signatures
        and catches what we raise."""
        place = id(caller), caller.f_lasti
        if cls.asked[0] != place:
            cls.asked = place, cls.latest

    @classmethod
    def dispatched(cls, caller: Any) -> None:
        """It was torch's C code, on its way to ``__torch_function__``: no refusal at all."""
        place, before = cls.asked
        if place == (id(caller), caller.f_lasti):
            cls.latest = before
