"""What to quantize and how: specs, presets, and the mapping from layers to them.

Specs are frozen and checked on construction, so that a mistake shows where it was written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from .errors import ConfigError, LevelSetError, did_you_mean
from .levels import LevelSet

KINDS = ("apot", "uniform", "pot", "fp4", "levels")
SCHEMES = ("paper", "torch")
GRANULARITIES = ("tensor", "channel", "group")
WEIGHT_OBSERVERS = ("mse", "minmax")
ACTIVATION_OBSERVERS = ("moving_average", "minmax", "percentile", "mse")
PRESET_BITS = range(2, 9)
GROUP_SIZE = 128


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise ConfigError, with the closest known name, unless ``value`` is one of ``known``.

    >>> check_choice("observer", "minmx", ["minmax", "mse"])
    Traceback (most recent call last):
    ...
    apot_fx.errors.ConfigError: unknown observer 'minmx'. Did you mean 'minmax'? (minmax, mse)
    """
    names = list(known)
    if value not in names:
        hint = did_you_mean(str(value), names)
        raise ConfigError(f"unknown {what} {value!r}.{hint} ({', '.join(names)})")


def _check_int(what: str, value: object, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{what} must be an integer {limits}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class _LevelFamily:
    """The fields that choose a level set, common to weights and activations."""

    bits: int = 4
    k: int = 2
    scheme: str = "paper"
    kind: str = "apot"
    levels: tuple[int, ...] | None = None

    def _check_family(self) -> None:
        owner = type(self).__name__
        if self.levels is not None and self.kind == "apot":
            self._set(kind="levels")
        check_choice(f"{owner}.kind", self.kind, KINDS)
        check_choice(f"{owner}.scheme", self.scheme, SCHEMES)
        _check_int(f"{owner}.bits", self.bits, 1)
        _check_int(f"{owner}.k", self.k, 1)
        if (self.levels is not None) != (self.kind == "levels"):
            raise ConfigError(f"{owner}: give levels with kind='levels', and only with it")
        if self.kind != "apot" and (self.k, self.scheme) != (2, "paper"):
            raise ConfigError(
                f"{owner}: k and scheme mean nothing to kind={self.kind!r}; drop them"
            )
        if self.kind in ("fp4", "levels"):
            self._fix_bits()

    def _fix_bits(self) -> None:
        """Take the bits from the level set itself; they may be given only if they agree."""
        level_set = self._build(signed=True)
        bits = level_set.bits
        if self.levels is not None:
            self._set(levels=tuple(level_set.levels))
        if self.bits not in (4, bits):
            raise ConfigError(
                f"{type(self).__name__}: this level set has {bits} bits, not {self.bits}; drop bits"
            )
        self._set(bits=bits)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _build(self, signed: bool) -> LevelSet:
        try:
            if self.kind == "apot":
                return LevelSet.apot(self.bits, self.k, signed, self.scheme)
            if self.kind == "uniform":
                return LevelSet.uniform(self.bits, signed)
            if self.kind == "pot":
                return LevelSet.pot(self.bits, signed)
            return LevelSet.fp4() if self.kind == "fp4" else LevelSet(self.levels or ())
        except LevelSetError as error:
            sign = "signed" if signed else "unsigned"
            raise LevelSetError(f"{type(self).__name__}, {sign} level set: {error}") from None

    def _describe_family(self) -> str:
        if self.levels is not None:
            return f"{len(self.levels)} own levels"
        if self.kind != "apot":
            return "fp4" if self.kind == "fp4" else f"{self.kind}{self.bits}"
        return f"apot{self.bits}/k{self.k}" + (" torch" if self.scheme == "torch" else "")


@dataclasses.dataclass(frozen=True)
class WeightSpec(_LevelFamily):
    """How a weight is quantized. Its level set is always signed.

    Args:
        bits: bits of the level set; ``fp4`` and own levels know theirs.
        k: bits per term and ``scheme`` ("paper", "torch"): see :meth:`LevelSet.apot`; for kind
            "apot" only.
        kind: "apot", "uniform", "pot", "fp4" or, with ``levels``, "levels".
        levels: own integers, 0 among them.
        granularity: one α per "tensor", output "channel", or "group" of ``group_size`` weights
            along the flattened input axis.
        observer: what finds α: "mse" (least squared error) or "minmax".

    Raises ConfigError for a field that can't be used, LevelSetError for an impossible level set.

    >>> WeightSpec(bits=3).describe()
    'apot3/k2 per channel, mse'
    >>> WeightSpec(kind="fp4", granularity="group", group_size=32).describe()
    'fp4 per group of 32, mse'
    """

    granularity: str = "channel"
    group_size: int | None = None
    observer: str = "mse"

    def __post_init__(self) -> None:
        self._check_family()
        check_choice("WeightSpec.granularity", self.granularity, GRANULARITIES)
        check_choice("WeightSpec.observer", self.observer, WEIGHT_OBSERVERS)
        if self.granularity == "group":
            _check_int("WeightSpec.group_size", self.group_size, 1)
        elif self.group_size is not None:
            raise ConfigError("WeightSpec: group_size needs granularity='group'")
        if self.level_set().q_min >= 0:
            raise ConfigError("WeightSpec: weights need negative levels too; add some to levels")

    def level_set(self) -> LevelSet:
        """The signed level set."""
        return self._build(signed=True)

    def describe(self) -> str:
        """One short line for tables."""
        size = f" of {self.group_size}" if self.group_size else ""
        return f"{self._describe_family()} per {self.granularity}{size}, {self.observer}"


@dataclasses.dataclass(frozen=True)
class ActivationSpec(_LevelFamily):
    """How a layer's input is quantized, with one α per tensor.

    Args:
        bits, k, scheme, kind, levels: as for :class:`WeightSpec`.
        signed: True or False fixes it; None leaves it to the graph (relu is unsigned) and to
            calibration, and both level sets must exist. Own levels and fp4 decide it themselves.
        observer: "moving_average", "minmax", "percentile" or "mse".
        residual: None leaves residual adds and average pools in float; 2 to 8 puts them on
            uniform indices of that many bits.
        products: None leaves products of two activations (matmul, einsum, attention) in float; 2
            to 8 puts both operands on uniform indices of that many bits, as residual does.

    Raises ConfigError for a field that can't be used, LevelSetError for an impossible level set.

    >>> spec = ActivationSpec(bits=3)
    >>> spec.level_set(signed=False).unit, spec.level_set(signed=True).unit
    (10, 4)
    >>> spec.describe()
    'apot3/k2, moving_average'
    """

    signed: bool | None = None
    observer: str = "moving_average"
    residual: int | None = None
    products: int | None = None

    def __post_init__(self) -> None:
        self._check_family()
        check_choice("ActivationSpec.observer", self.observer, ACTIVATION_OBSERVERS)
        if self.signed not in (None, True, False):
            raise ConfigError(f"ActivationSpec.signed: True, False or None, not {self.signed!r}")
        for field in ("residual", "products"):
            if (bits := getattr(self, field)) is not None:
                _check_int(f"ActivationSpec.{field}", bits, 2, 8)
        if self.kind in ("fp4", "levels"):
            signed = self._build(signed=True).signed
            if self.signed not in (None, signed):
                raise ConfigError(
                    f"ActivationSpec: these levels say signed={signed}; drop signed={self.signed}"
                )
            self._set(signed=signed)
        for signed in (True, False) if self.signed is None else (self.signed,):
            self._build(signed)

    def level_set(self, signed: bool) -> LevelSet:
        """The signed or the unsigned member; of own levels and fp4 there is only one."""
        return self._build(signed)

    def describe(self) -> str:
        """One short line for tables."""
        sign = {None: "", True: " signed", False: " unsigned"}[self.signed]
        residual = f", residual uniform{self.residual}" if self.residual else ""
        products = f", products uniform{self.products}" if self.products else ""
        return f"{self._describe_family()}{sign}, {self.observer}{residual}{products}"


@dataclasses.dataclass(frozen=True)
class QConfig:
    """A layer's weight and input specs. ``activation=None`` is weight-only.

    ``weight=None`` suits operators without a weight. Raises ConfigError when both are None (a
    mapping says float with None itself) or of another type.

    >>> QConfig.from_preset("w4a4").describe()
    'weight apot4/k2 per channel, mse; input apot4/k2, moving_average'
    """

    weight: WeightSpec | None
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        for field, kind in (("weight", WeightSpec), ("activation", ActivationSpec)):
            if not isinstance(getattr(self, field), (kind, type(None))):
                raise ConfigError(f"QConfig.{field} must be {kind.__name__} or None")
        if self.weight is None and self.activation is None:
            raise ConfigError("QConfig quantizes nothing; give None instead of it to leave float")

    @classmethod
    def from_preset(cls, name: str) -> QConfig:
        """The preset's interior layers; raises ConfigError for an unknown name."""
        weight, activation = _preset_bits(name)
        if activation is None:
            return cls(WeightSpec(weight, granularity="group", group_size=GROUP_SIZE))
        return cls(WeightSpec(weight), ActivationSpec(activation))

    def describe(self) -> str:
        """One line for tables."""
        weight = self.weight.describe() if self.weight else "float"
        return f"weight {weight}; input " + (
            self.activation.describe() if self.activation else "float"
        )


#: First and last layers of a ``wXaY`` preset.
OUTER = QConfig(WeightSpec(8, kind="uniform"), ActivationSpec(8, kind="uniform"))


def _preset_bits(name: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"w([2-8])(?:a([2-8]))?", name)
    if match is None:
        known = [f"w{w}{a}" for w in PRESET_BITS for a in ("", *(f"a{a}" for a in PRESET_BITS))]
        hint = did_you_mean(name.lower(), known)
        raise ConfigError(f"unknown preset {name!r}.{hint} (wXaY or wX, with X and Y from 2 to 8)")
    return int(match[1]), int(match[2]) if match[2] else None


def presets() -> list[dict[str, str]]:
    """One row per documented preset; every other wXaY and wX follows the same rule.

    >>> presets()[0]["preset"], presets()[0]["weight"]
    ('w8a8', 'apot8/k2 per channel, mse')
    """
    rows = []
    for name in ("w8a8", "w5a5", "w4a4", "w3a3", "w8", "w4", "w3"):
        config = QConfig.from_preset(name)
        assert config.weight is not None
        only = config.activation is None
        rows.append(
            {
                "preset": name,
                "weight": config.weight.describe(),
                "input": config.activation.describe() if config.activation else "float",
                "layers": "Linear" if only else "all",
                "first and last": "last: float" if only else f"both: {OUTER.describe()}",
            }
        )
    return rows


class Follow(Enum):
    """``GLOBAL``: the first or last layer is like any other."""

    GLOBAL = "global"


Choice = QConfig | str | None
Outer = QConfig | None | Follow

#: The layers that a weight-only preset means, by qualified name (transformers isn't imported).
_LINEAR = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


def _to_qconfig(choice: Choice) -> QConfig | None:
    if choice is None or isinstance(choice, QConfig):
        return choice
    if isinstance(choice, str):
        return QConfig.from_preset(choice)
    raise ConfigError(f"a QConfig, a preset's name or None is wanted, not {choice!r}")


def _is_below(name: str, top: str) -> bool:
    return name == top or name.startswith(top + ".")


@dataclasses.dataclass
class QConfigMapping:
    """Which QConfig a layer gets; None leaves it in float.

    ``set_global < set_object_type < set_module_name_regex < set_module_name``, whatever the order
    of the calls. A setter changes the mapping and returns it. The policy for first and last layers
    changes the global choice only, and only where that quantizes.

    >>> mapping = QConfigMapping.from_preset("w4a4").set_module_name("fc", None)
    >>> mapping.resolve("layer1.conv", object, first=False, last=False).weight.bits
    4
    >>> mapping.resolve("stem", object, first=True, last=False).weight.kind
    'uniform'
    >>> mapping.resolve("fc", object, first=False, last=True) is None
    True
    """

    global_config: QConfig | None = None
    global_types: tuple[str, ...] | None = None
    first: Outer = Follow.GLOBAL
    last: Outer = Follow.GLOBAL
    types: dict[Callable[..., Any], QConfig | None] = dataclasses.field(default_factory=dict)
    regexes: dict[str, QConfig | None] = dataclasses.field(default_factory=dict)
    names: dict[str, QConfig | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_preset(cls, name: str) -> QConfigMapping:
        """A fresh mapping for "wXaY" or "wX"; raises ConfigError for an unknown name.

        ``wXaY`` has 8-bit uniform first and last layers. ``wX`` reaches Linear (and transformers'
        Conv1D) and leaves the last layer in float.
        """
        config = QConfig.from_preset(name)
        if config.activation is None:
            return cls(config, global_types=_LINEAR, last=None)
        return cls(config, first=OUTER, last=OUTER)

    @classmethod
    def of(cls, value: str | QConfig | QConfigMapping) -> QConfigMapping:
        """A preset's mapping, a QConfig for every layer alike, or the mapping itself."""
        if isinstance(value, QConfigMapping):
            return value
        if isinstance(value, str):
            return cls.from_preset(value)
        if isinstance(value, QConfig):
            return cls().set_global(value)
        raise ConfigError(f"a preset's name, QConfig or QConfigMapping is wanted, not {value!r}")

    def set_global(self, config: Choice) -> QConfigMapping:
        """For every layer of every type that nothing else names."""
        self.global_config, self.global_types = _to_qconfig(config), None
        return self

    def set_first_last(self, config: Choice | Follow) -> QConfigMapping:
        """For layers next to the model's inputs and outputs; ``Follow.GLOBAL`` ends the policy."""
        self.first = self.last = config if isinstance(config, Follow) else _to_qconfig(config)
        return self

    def set_object_type(self, kind: Callable[..., Any], config: Choice) -> QConfigMapping:
        """For a layer class and its subclasses (the nearest class wins), or a torch function."""
        if not callable(kind):
            raise ConfigError(f"set_object_type: a class or function is wanted, not {kind!r}")
        self.types[kind] = _to_qconfig(config)
        return self

    def set_module_name_regex(self, regex: str, config: Choice) -> QConfigMapping:
        """For names that ``re.match`` accepts; of several regexes the first one set wins."""
        try:
            re.compile(regex)
        except (re.error, TypeError) as error:
            raise ConfigError(f"set_module_name_regex: {regex!r} is no regex ({error})") from None
        self.regexes[regex] = _to_qconfig(config)
        return self

    def set_module_name(self, name: str, config: Choice) -> QConfigMapping:
        """For a layer, or for every layer below a container; the longest name wins."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"set_module_name: a layer's name is wanted, not {name!r}")
        self.names[name] = _to_qconfig(config)
        return self

    def resolve(
        self,
        name: str,
        module_type: Callable[..., Any] | tuple[Callable[..., Any], ...],
        first: bool,
        last: bool,
    ) -> QConfig | None:
        """The QConfig of a layer, or None for float. A first layer that is also last is last.

        ``module_type``: its class, or all that it goes by, nearest first.
        """
        classes = _classes(module_type)
        named = self._named(name, classes)
        if named:
            return named[0]
        paths = {f"{kind.__module__}.{kind.__name__}" for kind in classes}
        if self.global_types is not None and paths.isdisjoint(self.global_types):
            return None
        outer = self.last if last else self.first if first else Follow.GLOBAL
        if self.global_config is None or isinstance(outer, Follow):
            return self.global_config
        return outer

    def names_layer(
        self, name: str, module_type: Callable[..., Any] | tuple[Callable[..., Any], ...]
    ) -> bool:
        """Whether a layer is chosen by its name or type, and not only by the global choice."""
        return bool(self._named(name, _classes(module_type)))

    def _named(self, name: str, classes: list[Callable[..., Any]]) -> list[QConfig | None]:
        """The choice for a layer's name or type, nearest first."""
        tops = sorted((top for top in self.names if _is_below(name, top)), key=len, reverse=True)
        return [
            *(self.names[top] for top in tops),
            *(config for regex, config in self.regexes.items() if re.match(regex, name)),
            *(self.types[kind] for kind in classes if kind in self.types),
        ]

    def check_quantizes(self) -> None:
        """Raise ConfigError where every choice of this mapping is None."""
        chosen = (self.global_config, self.first, self.last)
        named = (*self.types.values(), *self.regexes.values(), *self.names.values())
        if not any(isinstance(choice, QConfig) for choice in (*chosen, *named)):
            raise ConfigError(
                "this QConfigMapping quantizes nothing: every choice is None; start from "
                "QConfigMapping.from_preset, or call set_global"
            )

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a name or regex of this mapping that matches none of ``names``."""
        layers = list(names)
        for name in self.names:
            if not any(_is_below(layer, name) for layer in layers):
                hint = did_you_mean(name, layers + _containers(layers))
                raise ConfigError(f"set_module_name: no layer is called {name!r}.{hint}")
        for regex in self.regexes:
            if not any(re.match(regex, layer) for layer in layers):
                hint = did_you_mean(regex, layers)
                raise ConfigError(f"set_module_name_regex: {regex!r} matches no layer.{hint}")


def _classes(
    module_type: Callable[..., Any] | tuple[Callable[..., Any], ...],
) -> list[Callable[..., Any]]:
    """All that a layer goes by: its classes and their bases, nearest first."""
    single = module_type if isinstance(module_type, tuple) else (module_type,)
    return [kind for one in single for kind in getattr(one, "__mro__", (one,))]


def _containers(layers: list[str]) -> list[str]:
    """Every proper prefix of dotted names."""
    parts = [layer.split(".") for layer in layers]
    return sorted({".".join(part[:end]) for part in parts for end in range(1, len(part))})
