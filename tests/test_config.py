"""Specs, presets and the mapping."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from apot_fx import ActivationSpec, QConfig, QConfigMapping, WeightSpec, presets
from apot_fx.config import Follow
from apot_fx.errors import ConfigError, LevelSetError


@pytest.mark.parametrize(("build", "error", "text"), [
    (lambda: WeightSpec(bits=6, k=3), LevelSetError, "legal k"),
    (lambda: WeightSpec(bits=1), LevelSetError, "none is left"),
    (lambda: ActivationSpec(bits=7, k=3), LevelSetError, "unsigned"),
    (lambda: WeightSpec(kind="apott"), ConfigError, "Did you mean 'apot'"),
    (lambda: WeightSpec(granularity="chanel"), ConfigError, "Did you mean 'channel'"),
    (lambda: WeightSpec(granularity="group"), ConfigError, "group_size"),
    (lambda: WeightSpec(group_size=32), ConfigError, "granularity='group'"),
    (lambda: WeightSpec(observer="msee"), ConfigError, "Did you mean 'mse'"),
    (lambda: WeightSpec(levels=(0, 1, 2)), ConfigError, "negative"),
    (lambda: WeightSpec(kind="uniform", k=3), ConfigError, "k and scheme"),
    (lambda: ActivationSpec(residual=9), ConfigError, "residual"),
    (lambda: ActivationSpec(signed="no"), ConfigError, "signed"),
    (lambda: QConfig(None, None), ConfigError, "nothing"),
    (lambda: QConfig(4), ConfigError, "WeightSpec"),
    (lambda: QConfig.from_preset("w4a44"), ConfigError, "Did you mean 'w4a4'"),
    (lambda: QConfig.from_preset("w9a9"), ConfigError, "unknown preset"),
    (lambda: QConfigMapping.of(4), ConfigError, "preset's name"),
    (lambda: QConfigMapping().set_module_name("", None), ConfigError, "name"),
    (lambda: QConfigMapping().set_module_name_regex("(", None), ConfigError, "regex"),
])  # fmt: skip
def test_refusals(build: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        build()
    assert text in str(caught.value)


def bits(config: QConfig | None) -> int | None:
    return None if config is None or config.weight is None else config.weight.bits


def test_precedence() -> None:
    mapping = (
        QConfigMapping()
        .set_module_name("a.b", "w5a5")
        .set_module_name_regex("a", "w3a3")
        .set_object_type(nn.Linear, "w2a2")
        .set_global("w4a4")
    )
    ask = {"first": False, "last": False}
    assert bits(mapping.resolve("a.b", nn.Linear, **ask)) == 5
    assert bits(mapping.resolve("a.b.c", nn.Linear, **ask)) == 5  # a container's name reaches down
    assert bits(mapping.resolve("a.c", nn.Linear, **ask)) == 3
    assert bits(mapping.resolve("x", nn.Linear, **ask)) == 2
    assert bits(mapping.resolve("x", nn.Conv2d, **ask)) == 4
    assert mapping.set_module_name("x", None).resolve("x", nn.Conv2d, **ask) is None


def test_first_and_last_change_the_global_choice_only() -> None:
    mapping = QConfigMapping.from_preset("w4a4").set_module_name("head", "w3a3")
    assert bits(mapping.resolve("stem", nn.Conv2d, first=True, last=False)) == 8
    assert bits(mapping.resolve("head", nn.Linear, first=False, last=True)) == 3
    mapping.set_first_last(Follow.GLOBAL)
    assert bits(mapping.resolve("stem", nn.Conv2d, first=True, last=False)) == 4


def test_weight_only_presets() -> None:
    mapping = QConfigMapping.from_preset("w4")
    assert bits(mapping.resolve("fc", nn.Linear, first=True, last=False)) == 4
    assert mapping.resolve("head", nn.Linear, first=False, last=True) is None
    assert mapping.resolve("conv", nn.Conv2d, first=False, last=False) is None
    mapping.set_object_type(nn.Conv2d, "w4")
    assert bits(mapping.resolve("conv", nn.Conv2d, first=False, last=False)) == 4


def test_unmatched_names() -> None:
    mapping = QConfigMapping().set_module_name("layer1.conv9", "w4a4")
    with pytest.raises(ConfigError, match=r"Did you mean 'layer1\.conv1'"):
        mapping.check_names(["layer1.conv1", "fc"])
    with pytest.raises(ConfigError, match="matches no layer"):
        QConfigMapping().set_module_name_regex("z", None).check_names(["a"])


def test_presets_are_fresh_and_listed() -> None:
    assert QConfigMapping.from_preset("w4a4") is not QConfigMapping.from_preset("w4a4")
    assert {row["preset"] for row in presets()} >= {"w3a3", "w4a4", "w5a5", "w8a8", "w4"}
    assert hash(QConfig.from_preset("w4a4")) == hash(QConfig.from_preset("w4a4"))


def test_own_levels_and_fp4_know_their_bits_and_sign() -> None:
    assert WeightSpec(levels=(-1, 0, 1)).bits == 2
    assert WeightSpec(kind="fp4").level_set().unit == 12
    assert ActivationSpec(levels=(0, 1, 3)).signed is False
