"""The original's qconfigs, as :class:`apot_fx.QConfig`: any of them is a config for prepare_apot.

α is the largest magnitude (min-max observers), one per tensor, as there. APoT ones have the torch
scheme, so that levels are those of :class:`APoTObserver`; signed sets of b bits then have more than
2^b levels. ``QConfig.from_preset("w4a4")`` is what we recommend.

>>> import apot_fx
>>> from torch import nn
>>> prepared = apot_fx.prepare_apot(nn.Linear(4, 2), apot_qconfig_4bit)
>>> prepared.get_submodule("activation_post_process_0").spec.describe()
'apot4/k2 torch, minmax'
"""

from __future__ import annotations

from ..config import ActivationSpec, QConfig, WeightSpec


def _uniform_activation(bits: int) -> ActivationSpec:
    return ActivationSpec(bits, kind="uniform", observer="minmax")


def _apot_weight(bits: int) -> WeightSpec:
    return WeightSpec(bits, k=2, scheme="torch", granularity="tensor", observer="minmax")


def _uniform(bits: int) -> QConfig:
    weight = WeightSpec(bits, kind="uniform", granularity="tensor", observer="minmax")
    return QConfig(weight, _uniform_activation(bits))


def _apot(bits: int) -> QConfig:
    activation = ActivationSpec(bits, k=2, scheme="torch", observer="minmax")
    return QConfig(_apot_weight(bits), activation)


#: Uniform activations and weights.
uniform_qconfig_8bit, uniform_qconfig_4bit = _uniform(8), _uniform(4)

#: Uniform activations, APoT weights.
apot_weight_qconfig_8bit = QConfig(_apot_weight(8), _uniform_activation(8))
apot_weight_qconfig_4bit = QConfig(_apot_weight(4), _uniform_activation(4))

#: APoT activations and weights.
apot_qconfig_8bit, apot_qconfig_4bit = _apot(8), _apot(4)
