"""``FakeQuantize``: quantize and dequantize in float, with a gradient, and its life.

``observing`` (float passes, the observer fills) → ``frozen`` (α fixed) → ``learning`` (train, α by
gradient). A weight's is frozen from the start, since weights are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .config import ActivationSpec, WeightSpec
from .errors import CalibrationError, StateError
from .kernels import ALPHA_MAX, ALPHA_MIN, eager, step_of
from .levels import LevelSet
from .observer import Observer, make_observer, weight_alpha
from .tensor import check_alpha, keep_float32


class _Kept(NamedTuple):
    """What a weight became, and of what."""

    weight: nn.Parameter
    alpha: torch.Tensor
    made_of: object
    result: torch.Tensor
    version: int  # of the result

    def is_of(self, weight: nn.Parameter, alpha: torch.Tensor, made_of: object) -> bool:
        same = self.weight is weight and self.alpha is alpha and self.made_of == made_of
        return same and self.result._version == self.version


#: While :func:`keeping_weights` runs: of every weight's fake-quant.
_KEPT: ContextVar[WeakKeyDictionary[FakeQuantize, _Kept] | None] = ContextVar("kept", default=None)

OBSERVING, FROZEN, LEARNING = "observing", "frozen", "learning"

#: Largest unit for which a float32 value gives its level back exactly (``rint(x · M/α)``).
EXACT_UNIT = 2**15


class FakeQuantize(nn.Module):
    """Fake-quant of one tensor; made by :meth:`for_activation` and :meth:`for_weight`.

    Attributes:
        alpha: Parameter, float32, of its final shape from the start: ``()`` per tensor, ``(C,)``
            per channel, ``(C, groups)`` per group.
        state: ``"observing"``, ``"frozen"`` or ``"learning"``.
        signed: whether levels are signed; None while neither the graph nor calibration said so.
        level_set: the :class:`LevelSet`; None while ``signed`` is open. ``level_spec`` is its spec
            (or ""), ``unit`` its unit (or 0).
        observer: the observer module; None for weights, whose α is found from the weight itself.
        observer_enabled, fake_quant_enabled: switches, as in torch.

    In eval its result is float32 and NaN becomes the zero level; in train NaN passes, so that a
    diverging run is visible.
    """

    alpha: nn.Parameter
    observer: Observer | None

    def __init__(
        self,
        spec: WeightSpec | ActivationSpec,
        alpha: torch.Tensor,
        axis: int | None,
        group_size: int | None,
        observer: Observer | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.group_size = group_size
        self.alpha = nn.Parameter(alpha.detach().clone())
        self.observer = observer
        self.state = OBSERVING
        self.known_sign: bool | None = None  # by the config or the graph
        self.signed: bool | None = None
        self._use(None)
        self.observer_enabled = observer is not None
        self.fake_quant_enabled = True

    @classmethod
    def for_activation(cls, spec: ActivationSpec, signed: bool | None = None) -> FakeQuantize:
        """A per-tensor fake-quant that starts ``observing``; ``signed``: what the graph proves."""
        observer = make_observer(spec.observer, (), None, None)
        made = cls(spec, torch.ones(()), None, None, observer)
        made.known_sign = spec.signed if spec.signed is not None else signed
        if spec.levels is not None:
            made.known_sign = min(spec.levels) < 0
        made.restart()
        return made

    @classmethod
    def for_weight(cls, weight: torch.Tensor, spec: WeightSpec, name: str) -> FakeQuantize:
        """A frozen fake-quant for a weight whose axis 0 is the output channel.

        Raises TensorError naming ``name`` for a NaN or infinite weight.
        """
        level_set = spec.level_set()
        axis = None if spec.granularity == "tensor" else 0
        alpha = weight_alpha(
            weight.detach(), level_set, spec.observer, axis, spec.group_size, name=name
        )
        made = cls(spec, alpha, axis, spec.group_size, None)
        made.signed, made.state = True, FROZEN
        made._use(level_set)
        return made

    def _use(self, level_set: LevelSet | None) -> None:
        """Plain values beside the level set, so that forward compiles without looking into it."""
        self.level_spec = "" if level_set is None else level_set.spec
        self.unit = 0 if level_set is None else level_set.unit

    @property
    def level_set(self) -> LevelSet | None:
        return LevelSet.parse(self.level_spec) if self.level_spec else None

    @property
    def quantizes(self) -> bool:
        """Whether forward now puts values on the grid."""
        return self.state != OBSERVING and self.fake_quant_enabled

    @property
    def seen(self) -> bool:
        """Whether α is known or the observer saw a value."""
        return self.state != OBSERVING or bool(self.observer is not None and self.observer.seen)

    def clamped_alpha(self) -> torch.Tensor:
        """α within [2^-40, 2^40], as it is used; without gradient."""
        return self.alpha.detach().clamp(ALPHA_MIN, ALPHA_MAX)

    def step(self) -> torch.Tensor:
        """α / M, float32, once the level set is known."""
        return step_of(self.clamped_alpha(), self.unit)

    def known_level_set(self) -> LevelSet:
        if self.level_set is None:
            raise CalibrationError("signedness is not fixed yet; run apot_fx.calibrate first")
        return self.level_set

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.on_grid(x, known=self._observe(x) if self.observer_enabled else None)

    def on_grid(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What :meth:`forward` gives, with nothing observed.

        ``rows``: ``x`` is not the whole weight but these rows of it, each with its own α.
        ``known``: the result's values, where they came along the way.
        """
        if self.training and self.state == FROZEN:  # calibrated while in train mode
            self.state = LEARNING
        if not self.quantizes:
            return _Unused.apply(x, self.alpha) if self.training else x
        learns = self.state == LEARNING and not self.observer_enabled
        alpha = self.alpha if learns or self.training else self.alpha.detach()
        if self.training and self.observer_enabled:
            alpha = alpha.clone()  # it may be another when gradients come
        if rows is not None and self.axis is not None:
            alpha = alpha.index_select(0, rows)
        grad = "rcf" if learns else "ste"
        how = (self.level_spec, self.axis, self.group_size, grad, not self.training)
        # The first questions come first: a compiler does not follow the last.
        weight = None if self.observer is not None or rows is not None else _parameter_of(x)
        kept = None if weight is None else _KEPT.get()
        if weight is None or kept is None:
            return eager.fake_quantize(x, alpha, *how, known)
        made_of = (x.data_ptr(), x._version, x.shape, x.stride(), self.alpha._version, *how)
        found = kept.get(self)
        if found is not None and found.is_of(weight, self.alpha, made_of):
            return eager.fake_quantize(x, alpha, *how, found.result)
        y = eager.fake_quantize(x, alpha, *how)
        result = y.detach()
        kept[self] = _Kept(weight, self.alpha, made_of, result, result._version)
        return y

    def _observe(self, x: torch.Tensor) -> torch.Tensor | None:
        """Let the observer see ``x``; the result's values, where they came along the way."""
        if self.observer is not None and self.state != OBSERVING:
            y = self.observer.follow(x, self.level_spec, self.alpha, not self.training)
            return y if self.fake_quant_enabled else None
        with torch.no_grad():
            if self.observer is None:
                spec, level_set = self.spec, self.known_level_set()
                alpha = weight_alpha(x, level_set, spec.observer, self.axis, self.group_size)
                self._set_alpha(alpha)
                return None
            self.observer(x)
            if self.training and self.observer.seen:
                # First train forward without calibration: one batch says too little about signs.
                self._leave_observing(signed=self.known_sign is not False)
        return None

    def freeze_by(self, observer: Observer) -> None:
        """Take over another observer's statistics and freeze as if they had been seen here."""
        assert self.observer is not None
        enabled = self.observer_enabled and self.state != OBSERVING
        self.observer.load_state_dict(observer.state_dict())
        self.state, self.signed = OBSERVING, self.known_sign
        self.freeze()
        self.observer_enabled = enabled

    def freeze(self) -> None:
        """Fix signedness and α from what was observed; no effect unless ``observing``.

        Raises CalibrationError where nothing was observed.
        """
        if self.state != OBSERVING:
            return
        if not self.seen or self.observer is None:
            raise CalibrationError("it observed nothing; run apot_fx.calibrate with data first")
        signed = self.observer.is_signed() if self.signed is None else self.signed
        self._leave_observing(signed)

    def restart(self) -> None:
        """Back to ``observing`` with nothing observed (activations only)."""
        assert self.observer is not None and isinstance(self.spec, ActivationSpec)
        self.observer.reset()
        self.state, self.observer_enabled = OBSERVING, True
        self.signed = self.known_sign
        self._use(None if self.signed is None else self.spec.level_set(self.signed))

    def _leave_observing(self, signed: bool) -> None:
        assert isinstance(self.spec, ActivationSpec) and self.observer is not None
        self.signed = signed
        self._use(self.spec.level_set(signed))
        self._set_alpha(self.observer.propose(self.known_level_set()))
        self.state = LEARNING if self.training else FROZEN
        self.observer_enabled = False

    def _set_alpha(self, alpha: torch.Tensor) -> None:
        with torch.no_grad():
            self.alpha.copy_(alpha)

    def train(self, mode: bool = True) -> FakeQuantize:
        super().train(mode)
        if mode and self.state == FROZEN:
            self.state = LEARNING
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_float32(fn), recurse)

    def get_extra_state(self) -> torch.Tensor:
        """State, signedness, level set and switches as JSON in a uint8 tensor."""
        text = json.dumps({key: getattr(self, key) for key in _EXTRA})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        for key, value in _read_extra_state(state).items():
            setattr(self, key, value)
        self._use(self.level_set)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a NaN α, a wrong shape or an unreadable state before it is loaded."""
        if "alpha" in state:
            check_alpha(state["alpha"], self.alpha.shape, within_limits=False)
        if "_extra_state" in state:
            _read_extra_state(state["_extra_state"])

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        self.check_state(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        levels = self.level_spec or f"{self.spec.describe()}, signedness open"
        return f"{self.state}, {levels}, alpha{tuple(self.alpha.shape)}"


def _parameter_of(x: torch.Tensor) -> nn.Parameter | None:
    """The Parameter that a weight is, or a view of; None where it is computed or can't be seen."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    base = x if x._base is None else x._base
    return base if isinstance(base, nn.Parameter) else None


@contextmanager
def keeping_weights() -> Iterator[None]:
    """A context in which a quantized weight is used again where the same weight comes again."""
    token = _KEPT.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _KEPT.reset(token)


class _Unused(torch.autograd.Function):
    """``x``, with α in its graph but no gradient for it: DistributedDataParallel waits for every
    Parameter, also of a fake-quant that is switched off or led by its observer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[0], None


_EXTRA = ("state", "signed", "level_spec", "observer_enabled", "fake_quant_enabled")


def _read_extra_state(state: torch.Tensor) -> dict[str, Any]:
    try:
        found = json.loads(bytes(state.cpu().tolist()).decode())
        if set(found) != set(_EXTRA) or found["state"] not in (OBSERVING, FROZEN, LEARNING):
            raise ValueError
        if found["level_spec"]:
            LevelSet.parse(found["level_spec"])
    except (ValueError, TypeError, AttributeError):
        raise StateError(
            "_extra_state: not written by this version of apot_fx; save the checkpoint again"
        ) from None
    return dict(found)


def _switch(module: nn.Module, name: str, enabled: bool) -> None:
    switch = getattr(module, name, None)
    if isinstance(module, FakeQuantize):
        setattr(module, name, enabled)
    elif isinstance(switch, list):  # compat's, which only layers above know
        switch[0] = int(enabled)


def enable_observer(module: nn.Module) -> None:
    """For ``model.apply``: observers run; on a frozen or learning fake-quant α follows them."""
    _switch(module, "observer_enabled", True)


def disable_observer(module: nn.Module) -> None:
    """For ``model.apply``: observers stop."""
    _switch(module, "observer_enabled", False)


def enable_fake_quant(module: nn.Module) -> None:
    """For ``model.apply``: values are put on the grid (once out of ``observing``)."""
    _switch(module, "fake_quant_enabled", True)


def disable_fake_quant(module: nn.Module) -> None:
    """For ``model.apply``: values pass in float."""
    _switch(module, "fake_quant_enabled", False)


def freeze(model: nn.Module) -> None:
    """End calibration by hand: every fake-quant that observed something becomes ``frozen``."""
    for module in model.modules():
        if isinstance(module, FakeQuantize) and module.seen:
            module.freeze()
