"""ApotTensor: what is stored, given back, saved and refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import apot_fx
from apot_fx import ApotTensor, LevelSet
from apot_fx.errors import TensorError


@pytest.mark.parametrize("levels", [LevelSet.apot(3), LevelSet.uniform(8, True), LevelSet.apot(9)])
@pytest.mark.parametrize("where", [(None, None), (0, None), (0, 5)])
def test_it_gives_back_what_it_was_made_of(levels: LevelSet, where: tuple) -> None:
    x, (axis, group) = torch.randn(4, 3, 3), where
    shape = () if axis is None else (4,) if group is None else (4, 2)
    alpha = torch.rand(shape) + 1
    tensor = ApotTensor.from_float(x, alpha, levels, axis, group)
    index = apot_fx.quantize(x, alpha, levels, axis, group)
    assert torch.equal(tensor.int_repr(), index)
    assert torch.equal(tensor.dequantize(), apot_fx.dequantize(index, alpha, levels, axis, group))
    assert tensor.packed.numel() == -(-36 * levels.bits // 8)
    assert torch.equal(tensor.levels(), torch.tensor(levels.levels)[index.long()].float())
    for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert torch.equal(other.int_repr(), index) and other._levels is None


def test_state_dict_round_trip_drops_the_cache() -> None:
    first, second = (ApotTensor.from_float(torch.randn(6), 2.0, LevelSet.apot(4)) for _ in "ab")
    second.levels()
    assert set(first.state_dict()) == {"packed", "alpha"}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.levels(), first.levels())


def test_refusals_change_nothing() -> None:
    tensor = ApotTensor.from_float(torch.randn(6), 2.0, LevelSet.apot(4))
    before = tensor.int_repr()
    for key, value, text in (
        ("packed", torch.full((3,), 255, dtype=torch.uint8), "index 15"),
        ("packed", torch.zeros(4, dtype=torch.uint8), "is wanted"),
        ("alpha", torch.tensor(float("nan")), "NaN"),
        ("alpha", torch.tensor(0.0), "outside"),
        ("alpha", torch.ones(2), "shape"),
    ):
        with pytest.raises(TensorError, match=text):
            tensor.load_state_dict({**tensor.state_dict(), key: value})
        assert torch.equal(tensor.int_repr(), before) and tensor.alpha == 2.0
