"""Which line of the user's code is running: for the origin of nodes, and for decisions."""

from __future__ import annotations

import sys
import types

#: ``node.meta`` key, while tracing: the user's line that made the node.
LINE = "apot_line"

_NOT_USER_CODE = ("/torch/", "/apot_fx/", "<eval_with_key>")


def running_line(until: types.CodeType | None = None) -> str:
    """``file.py:12`` of the innermost running line outside torch and apot_fx, or ``""``.

    Only what ``until`` called, directly or not, is looked at.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        name = frame.f_code.co_filename
        if not any(part in name for part in _NOT_USER_CODE):
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
