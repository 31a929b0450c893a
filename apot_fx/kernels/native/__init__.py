"""The compiled kernels: finding the library, its instruction sets, and torch's threads.

The library is plain C without torch's or Python's headers, called by ``ctypes``. It is built with
the package; where that was not possible, or ``APOT_FX_ISA=reference`` asks for it, the package
computes the same with torch's own operators (``kernels/reference.py``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.machinery
import os
from pathlib import Path

import torch

from ...errors import ConfigError, did_you_mean

#: From the fastest to the slowest, as ``isa.c`` numbers them.
ISAS = ("avx512vbmi", "avx512", "avx2", "neon", "portable")

_VARIABLE = "APOT_FX_ISA"
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LAYOUT = (_LONG, _LONG, _LONG, _LONG)
_GAPS = (_LONG, _LONG)
_SIGNATURES = {
    "apot_fake_quantize": (*(_POINTER,) * 4, *_LAYOUT, *_GAPS, _INT, _INT, _INT, _INT),
    "apot_quantize": (*(_POINTER,) * 4, *_LAYOUT, *_GAPS, _INT, _INT, _INT),
    "apot_dequantize": (*(_POINTER,) * 4, *_LAYOUT, *_GAPS, _INT),
    "apot_backward": (*(_POINTER,) * 6, *_LAYOUT, _INT, _INT),
    "apot_ends": (_POINTER, _LONG, _INT, _POINTER, _INT),
    "apot_histogram": (_POINTER, _LONG, _INT, _POINTER, _POINTER, _INT),
    "apot_follow": (
        *(_POINTER, _POINTER, _LONG, _INT, _INT, _INT),
        *((_POINTER,) * 4),
        *(ctypes.c_float, _INT),
    ),
    "apot_pack": (_POINTER, _POINTER, _LONG, _INT, _INT),
    "apot_unpack": (_POINTER, _POINTER, _LONG, _INT, _INT),
}


@dataclasses.dataclass(frozen=True)
class Status:
    """Which kernels run, and why.

    Attributes:
        isa: the instruction set in use, or ``"reference"`` (torch's operators).
        available: the instruction sets that this machine has, fastest first.
        runtime: file name of the OpenMP runtime whose threads are used; "" for one thread.
        reason: why these.
    """

    isa: str
    available: tuple[str, ...]
    runtime: str
    reason: str

    def __str__(self) -> str:
        threads = f"threads of {self.runtime}" if self.runtime else "one thread"
        found = ", ".join(self.available) or "none"
        return f"{self.isa} ({self.reason}); {threads}; this machine has: {found}"


class Native:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, kinds in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = kinds, _INT
        self.library.apot_isa.argtypes, self.library.apot_isa.restype = (_INT,), ctypes.c_char_p
        self.library.apot_use_isa.argtypes, self.library.apot_use_isa.restype = (_INT,), None
        self.library.apot_use_runtime.argtypes = (_POINTER,)
        self.library.apot_use_runtime.restype = None
        self.available = tuple(
            name for place, name in enumerate(ISAS) if self.library.apot_isa(place)
        )
        self.runtime = self._join_threads()
        self.forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def use(self, isa: str) -> None:
        """Compute by one of the instruction sets from now on."""
        self.library.apot_use_isa(ISAS.index(isa))

    def threads(self) -> int:
        """As many as torch uses; one in a forked child, whose parent's threads are not there."""
        return 1 if self.forked else torch.get_num_threads()

    def _join_threads(self) -> str:
        """Take the ``GOMP_parallel`` of the runtime that torch has loaded; its file's name."""
        for name in _runtimes():
            try:
                found = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            except (OSError, AttributeError):
                continue
            self.library.apot_use_runtime(ctypes.cast(found, _POINTER))
            return Path(name).name
        return ""

    def _after_fork(self) -> None:
        self.forked = True


def _runtimes() -> list[str]:
    beside = sorted(str(path) for path in Path(torch.__file__).parent.glob("lib/*omp*.so*"))
    bundled = sorted(str(path) for path in Path(torch.__file__).parents[1].glob("torch.libs/*omp*"))
    macs = sorted(str(path) for path in Path(torch.__file__).parent.glob("lib/*omp*.dylib"))
    return [*beside, *bundled, *macs, "libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"]


def _library_path() -> Path | None:
    here = Path(__file__).parent
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return next((path for s in suffixes if (path := here / f"_native{s}").exists()), None)


@functools.cache
def _load() -> tuple[Native | None, Status]:
    wanted = os.environ.get(_VARIABLE, "")
    if wanted and wanted not in (*ISAS, "reference"):
        choices = (*ISAS, "reference")
        raise ConfigError(
            f"{_VARIABLE}={wanted!r} is no instruction set ({', '.join(choices)})."
            f"{did_you_mean(wanted, choices)}"
        )
    path = _library_path()
    if path is None:
        if wanted not in ("", "reference"):
            raise ConfigError(f"{_VARIABLE}={wanted}: {_NOT_BUILT}")
        return None, Status("reference", (), "", _NOT_BUILT)
    native = Native(path)
    if wanted == "reference":
        reason = f"{_VARIABLE} asks for it"
        return None, Status(wanted, native.available, native.runtime, reason)
    if wanted and wanted not in native.available:
        raise ConfigError(
            f"{_VARIABLE}={wanted}: this machine has {', '.join(native.available)} alone"
        )
    isa = wanted or native.available[0]
    native.use(isa)
    reason = f"{_VARIABLE} asks for it" if wanted else "the fastest here"
    return native, Status(isa, native.available, native.runtime, reason)


_NOT_BUILT = (
    "the compiled kernels were not built: install a C compiler and run pip install again; "
    "results are the same without them, only slower"
)


def loaded() -> Native | None:
    """The library, or None where torch's operators compute."""
    return _load()[0]


def status() -> Status:
    """Which kernels run, and why.

    Raises ConfigError where ``APOT_FX_ISA`` names none, or one that this machine lacks.

    >>> status().isa in (*ISAS, "reference")
    True
    """
    return _load()[1]
