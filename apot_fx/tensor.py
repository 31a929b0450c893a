"""``ApotTensor``: a quantized tensor as it is stored, packed indices and one float scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import kernels
from .errors import TensorError
from .kernels import ALPHA_MAX, ALPHA_MIN
from .levels import LevelSet


def keep_float32(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a module's ``_apply`` move its float32 tensors but never change their dtype.

    Scales are part of the arithmetic contract: ``model.half()`` must not round them.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        if tensor.dtype == torch.float32 and result.dtype != torch.float32:
            return tensor.to(result.device)
        return result

    return moved


def check_alpha(alpha: torch.Tensor, shape: torch.Size, within_limits: bool) -> None:
    """Refuse an α of a state_dict; raises TensorError (``alpha: …``)."""
    if alpha.shape != shape:
        raise TensorError(f"alpha: shape {tuple(alpha.shape)}, but {tuple(shape)} is wanted")
    if torch.isnan(alpha).any():
        raise TensorError("alpha: contains NaN; load a checkpoint from before the run diverged")
    if within_limits and not ((alpha >= ALPHA_MIN) & (alpha <= ALPHA_MAX)).all():
        raise TensorError("alpha: outside [2^-40, 2^40]; convert the prepared model again")


class ApotTensor(nn.Module):
    """Indices into a level set, packed at their stored bits, and α.

    A module, so that it moves, saves and loads with the layer that owns it.

    Buffers: ``packed`` (uint8, ``ceil(numel · bits / 8)`` bytes, little-endian bit stream) and
    ``alpha`` (float32; ``()``, ``(C,)`` or ``(C, groups)``).

    Args:
        index: indices, uint8 or int16, of any shape.
        alpha: clip values as :func:`apot_fx.quantize` takes them.
        level_set: the set the indices point into.
        axis: the channel axis of α, or None per tensor.
        group_size: elements per group along the flattened rest of ``axis``, or None.

    >>> import torch
    >>> from apot_fx import LevelSet
    >>> t = ApotTensor.from_float(torch.tensor([-1.0, 0.2, 0.9]), 1.0, LevelSet.apot(bits=3))
    >>> t.int_repr().tolist()
    [0, 4, 6]
    >>> t.dequantize().tolist()
    [-1.0, 0.25, 1.0]
    """

    packed: torch.Tensor
    alpha: torch.Tensor

    def __init__(
        self,
        index: torch.Tensor,
        alpha: torch.Tensor,
        level_set: LevelSet,
        axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.level_set = level_set
        self.axis = axis
        self.group_size = group_size
        self.shape = index.shape
        self.keep_decoded = True
        self._levels: tuple[object, torch.Tensor] | None = None
        packed = kernels.pack(index.detach(), level_set.bits)
        self.register_buffer("packed", packed)
        self.register_buffer("alpha", alpha.detach().float().clamp(ALPHA_MIN, ALPHA_MAX).clone())

    @classmethod
    def from_float(
        cls,
        x: torch.Tensor,
        alpha: float | torch.Tensor,
        level_set: LevelSet,
        axis: int | None = None,
        group_size: int | None = None,
    ) -> ApotTensor:
        """Quantize ``x`` (any float dtype); raises TensorError as :func:`apot_fx.quantize`."""
        clip = torch.as_tensor(alpha, dtype=torch.float32, device=x.device)
        index = kernels.quantize(x.detach(), clip, level_set, axis, group_size)
        return cls(index, clip, level_set, axis, group_size)

    def int_repr(self) -> torch.Tensor:
        """The indices, uint8 (int16 above 256 levels), of the original shape."""
        return kernels.unpack(self.packed, self.level_set.bits, tuple(self.shape))

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``dequantize()[rows]`` for ``rows`` (N,) along axis 0, of which only these are unpacked.

        α must be per tensor, or of axis 0.
        """
        bits, row = self.level_set.bits, self.shape[1:]
        if row.numel() * bits % 8:  # rows that share bytes
            index = self.int_repr().index_select(0, rows)
        else:
            packed = self.packed.view(self.shape[0], -1).index_select(0, rows)
            index = torch.ops.apot_fx.unpack(packed.reshape(-1), bits, [len(rows), *row])
        alpha = self.alpha if self.axis is None else self.alpha.index_select(0, rows)
        values: torch.Tensor = torch.ops.apot_fx.dequantize(
            index, alpha, self.level_set.spec, self.axis, self.group_size
        )
        return values

    def dequantize(self) -> torch.Tensor:
        """``level · step``, float32, of the original shape."""
        return kernels.dequantize(
            self.int_repr(), self.alpha, self.level_set, self.axis, self.group_size
        )

    def levels(self) -> torch.Tensor:
        """The integer levels as float32. Decoded once and kept; treat as read-only."""
        if torch.compiler.is_compiling() or not self.keep_decoded:
            return self._decode()
        version = None if self.packed.is_inference() else self.packed._version
        key = (self.packed.data_ptr(), version, self.packed.device)
        if self._levels is None or self._levels[0] != key:
            with torch.inference_mode(False):  # what is kept must serve under autograd, too
                self._levels = (key, self._decode())
        return self._levels[1]

    def _decode(self) -> torch.Tensor:
        index: torch.Tensor = torch.ops.apot_fx.unpack(
            self.packed, self.level_set.bits, list(self.shape)
        )
        decoded: torch.Tensor = torch.ops.apot_fx.levels(index, self.level_set.spec)
        return decoded

    def drop_cache(self) -> None:
        """Forget decoded levels: writes through ``.data`` or NumPy go unnoticed by torch."""
        self._levels = None

    @property
    def step(self) -> torch.Tensor:
        """α / M, float32, of α's shape."""
        return kernels.step_of(self.alpha, self.level_set.unit)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that :meth:`dequantize` gives."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def numel(self) -> int:
        return self.shape.numel()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse indices ≥ L and bad α before they are loaded; raises TensorError."""
        if "alpha" in state:
            check_alpha(state["alpha"], self.alpha.shape, within_limits=True)
        packed = state.get("packed")
        if packed is None:
            return
        if packed.shape != self.packed.shape or packed.dtype != torch.uint8:
            raise TensorError(
                f"packed: {tuple(packed.shape)} {packed.dtype}, "
                f"but {tuple(self.packed.shape)} torch.uint8 is wanted"
            )
        index = kernels.unpack(packed, self.level_set.bits, tuple(self.shape))
        if index.numel() and int(index.max()) >= len(self.level_set):
            raise TensorError(
                f"packed: holds index {int(index.max())}, but {self.level_set} has "
                f"{len(self.level_set)} levels; the file is damaged or of another level set"
            )

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        self.check_state(own)
        self.drop_cache()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.drop_cache()
        return super()._apply(keep_float32(fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_levels": None}

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{tuple(self.shape)}, {self.level_set}, axis={self.axis}{group}"
