"""Codes and levels: PyTorch's values, an oracle on rationals, every kind of input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.ao.quantization.observer import MinMaxObserver

import apot_fx
from apot_fx import LevelSet
from apot_fx.compat import (
    APoTObserver,
    APoTQuantizer,
    TensorAPoT,
    apot_to_float,
    dequantize_APoT,
    float_to_apot,
    quant_dequant_APoT,
    quant_dequant_util,
    quantize_APoT,
)
from apot_fx.errors import CompatError, StateError, TensorError
from tests.compat.oracle import acceptable_codes

QParams = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
NAN, INF = float("nan"), float("inf")


def qparams(b: int = 4, k: int = 2, signed: bool = False, alpha: float = 1.0) -> QParams:
    return APoTObserver(b, k).calculate_qparams(signed, min_val=0.0, max_val=alpha)


def observed(x: torch.Tensor, b: int, k: int, signed: bool = False) -> QParams:
    observer = APoTObserver(b, k)
    observer(x)
    return observer.calculate_qparams(signed)


# What PyTorch's suite expects --------------------------------------------------------------------


def test_documented_codes() -> None:
    x = torch.tensor([0, 0.0215, 0.1692, 0.385, 1, 0.0391])
    kept = x.clone()
    codes = quantize_APoT(x, *observed(x, 4, 2)).data
    assert torch.equal(codes, torch.tensor([0, 3, 8, 13, 5, 12], dtype=torch.int32))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("seed", range(20))
def test_k1_is_uniform(seed: int) -> None:
    torch.manual_seed(seed)
    x = 1000 * torch.rand(1 + seed)
    uniform = MinMaxObserver()
    uniform(x)
    scale, zero_point = uniform.calculate_qparams()
    wanted = torch.quantize_per_tensor(x, float(scale), int(zero_point), torch.quint8).int_repr()
    assert torch.equal(quantize_APoT(x, *observed(x, 8, 1)).data, wanted.int())


@pytest.mark.parametrize(("b", "k"), [(4, 2), (12, 4), (8, 2), (6, 3)])
@pytest.mark.parametrize("signed", [False, True])
def test_round_trip(b: int, k: int, signed: bool) -> None:
    torch.manual_seed(b)
    x = 1000 * torch.rand(7, 5, 3)
    table = observed(x, b, k, signed)
    codes = quantize_APoT(x, *table)
    values = dequantize_APoT(codes)
    assert values.dtype == torch.float32 and values.shape == x.shape
    assert torch.equal(quantize_APoT(values, *table).data, codes.data)
    assert torch.equal(quant_dequant_APoT(x, *table), values)
    assert set(values.flatten().tolist()) <= set(table[2].tolist())


@pytest.mark.parametrize(("b", "k"), [(4, 2), (8, 2), (12, 4), (4, 4)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 100.23, 2.0**-40, 2.0**40])
def test_every_level_and_its_neighbours_round_trip(
    b: int, k: int, signed: bool, alpha: float
) -> None:
    """With b12k4 many levels differ by less than float32 tells apart: they share a code."""
    table = qparams(b, k, signed, alpha)
    levels = table[2]
    ends = [torch.nextafter(levels, torch.tensor(end)) for end in (INF, -INF)]
    codes = quantize_APoT(torch.cat([levels, *ends]), *table)
    assert torch.equal(quantize_APoT(dequantize_APoT(codes), *table).data, codes.data)
    assert torch.equal(quant_dequant_APoT(levels, *table), levels)


# Against rationals -------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    bk=st.sampled_from([(4, 2), (4, 1), (4, 4), (6, 2), (6, 3), (8, 1), (8, 2), (12, 4)]),
    signed=st.booleans(),
    alpha=st.floats(2.0**-10, 2.0**17, width=32),
    share=st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=5),
)
def test_nearest_code(bk: tuple[int, int], signed: bool, alpha: float, share: list[float]) -> None:
    b, k = bk
    if (b, k, signed) == (12, 4, True):
        b, k = 6, 2
    x = torch.tensor(share) * alpha
    found = quantize_APoT(x, *qparams(b, k, signed, alpha)).data.tolist()
    for value, code in zip(x.tolist(), found, strict=True):
        assert code in acceptable_codes(value, alpha, b, k, signed), (value, alpha)


def test_out_of_range_and_not_finite() -> None:
    x = torch.tensor([-INF, -9.0, -0.3, NAN, 9.0, INF])
    assert quantize_APoT(x, *qparams()).data.tolist() == [0, 0, 0, 0, 5, 5]
    assert quant_dequant_APoT(x, *qparams()).tolist() == [0, 0, 0, 0, 1, 1]
    signed = qparams(signed=True)
    assert quant_dequant_APoT(x, *signed).tolist()[:2] == [-1, -1]
    assert quant_dequant_APoT(x, *signed).tolist()[3:] == [0, 1, 1]
    zero = quantize_APoT(torch.zeros(1), *signed).data
    assert torch.equal(quantize_APoT(torch.tensor([NAN]), *signed).data, zero)


def test_of_codes_with_one_level_the_first_is_given() -> None:
    _, _, levels, codes = table = qparams(signed=True)
    first: dict[float, int] = {}
    for level, code in zip(levels.tolist(), codes.tolist(), strict=True):
        first.setdefault(level, code)
    assert len(first) == 39
    assert quantize_APoT(levels, *table).data.tolist() == [first[v] for v in levels.tolist()]
    every = TensorAPoT(APoTQuantizer(*table), codes.int())
    assert torch.equal(dequantize_APoT(every), levels)


def test_it_is_the_library_that_quantizes() -> None:
    level_set, x = LevelSet.apot(8, 2, False, "torch"), torch.rand(1000)
    table = observed(x, 8, 2)
    index = apot_fx.quantize(x, table[0], level_set)
    codes = torch.tensor(level_set.codes)[index.long()]
    assert torch.equal(quantize_APoT(x, *table).data, codes.int())
    values = apot_fx.dequantize(index, table[0], level_set)
    assert torch.equal(quant_dequant_APoT(x, *table), values)


# Kinds of input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.rand(shape).to(dtype)
    codes = quantize_APoT(x, *qparams())
    assert codes.data.shape == shape and codes.data.dtype == torch.int32
    wanted = quantize_APoT(x.float(), *qparams()).data
    assert torch.equal(codes.data, wanted)
    assert dequantize_APoT(codes).dtype == torch.float32
    again = quant_dequant_APoT(x, *qparams())
    assert again.dtype == dtype and torch.equal(again, dequantize_APoT(codes).to(dtype))


@pytest.mark.parametrize("size", [8, 2000])
def test_strides_do_not_matter(size: int) -> None:
    x = torch.rand(size, 2, 300)
    for view in (
        x.transpose(0, 2),
        x[::3, :, 5:],
        x.expand(2, -1, -1, -1),
        x[:1].expand(4, 2, 300),
    ):
        assert torch.equal(quantize_APoT(view, *qparams()).data,
                           quantize_APoT(view.contiguous(), *qparams()).data)  # fmt: skip
        assert torch.equal(quant_dequant_APoT(view, *qparams()),
                           quant_dequant_APoT(view.contiguous(), *qparams()))  # fmt: skip


def test_gradients_stop_and_inference_mode_leaves_nothing_behind() -> None:
    with torch.inference_mode():
        quant_dequant_APoT(torch.rand(3), *qparams(alpha=77.0))
    x = torch.rand(3, requires_grad=True)
    table = qparams(alpha=77.0)
    assert not quant_dequant_APoT(x, *table).requires_grad
    learned = (table[0].clone().requires_grad_(), *table[1:])
    assert not dequantize_APoT(quantize_APoT(x, *learned)).requires_grad


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.rand(3, 4, 5).transpose(0, 2)
        table = observed(x, 4, 2, True)
        codes = quantize_APoT(x, *table)
        values = (dequantize_APoT(codes), quant_dequant_APoT(x, *table))
        single = float_to_apot(x, table[2], table[3], table[0])
        assert "?" in repr(codes.quantizer)
        assert "?" in repr(codes.quantizer)
    real = quantize_APoT(torch.rand(3), *qparams())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert "16 levels" in repr(real)
    assert codes.data.dtype == torch.int32 and codes.data.stride() == x.stride()
    assert all(v.shape == x.shape and v.dtype == torch.float32 for v in values)
    assert single.dtype == torch.int64


def test_another_device_than_the_qparams() -> None:
    """meta stands for it: tables follow the values."""
    x, table = torch.rand(2, 3, device="meta"), qparams()
    codes = quantize_APoT(x, *table)
    for found in (codes.data, dequantize_APoT(codes), quant_dequant_APoT(x, *table)):
        assert found.is_meta and found.shape == x.shape
    observer = APoTObserver(4, 2)
    observer.min_val, observer.max_val = torch.tensor([0.0]), torch.tensor([1.0])
    observer(x)
    assert all(value.is_meta for value in observer.calculate_qparams(True))


def test_operators_are_well_formed() -> None:
    alpha, _, levels, codes = qparams(signed=True)
    x, ops = torch.rand(3, 4).T, torch.ops.apot_fx_compat
    whole = quantize_APoT(x, *qparams(signed=True)).data
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, first in ((ops.quantize, x), (ops.quant_dequant, x), (ops.dequantize, whole)):
        torch.library.opcheck(op.default, (first, alpha, levels, codes), test_utils=tests)


def test_compiled_without_graph_breaks() -> None:
    table, x = qparams(), torch.rand(100)
    compiled = torch.compile(
        lambda x: (quantize_APoT(x, *table).data, quant_dequant_APoT(x, *table)),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    codes, values = compiled(x)
    assert torch.equal(codes, quantize_APoT(x, *table).data)
    assert torch.equal(values, quant_dequant_APoT(x, *table))


# Levels of one's own -----------------------------------------------------------------------------


def test_given_levels_are_taken_as_they_are_in_any_order() -> None:
    levels = torch.tensor([0.3333, 0.0, 1.0, -0.0208, 0.6667])
    codes = torch.tensor([7, 0, 2, 9, 100])
    quantizer = APoTQuantizer(torch.tensor(1.0), torch.tensor(1.0), levels, codes)
    x = torch.tensor([0.3, -5.0, 0.51, 0.1, 3.0, -0.0103, -0.0104])  # the last a tie
    found = quantizer.quantize(x)
    assert found.data.tolist() == [7, 9, 100, 0, 2, 0, 9]
    assert torch.equal(quantizer.dequantize(found), quantizer.quant_dequant(x))
    assert set(quantizer.quant_dequant(x).tolist()) <= set(levels.tolist())


def test_levels_that_the_original_rounded_are_recognized() -> None:
    alpha, gamma, levels, codes = qparams(12, 4, False, 100.23)
    theirs = torch.nextafter(levels, torch.tensor(INF))
    theirs[0] = 0.0
    x = 100 * torch.rand(100)
    assert torch.equal(quantize_APoT(x, alpha, gamma, theirs, codes).data,
                       quantize_APoT(x, alpha, gamma, levels, codes).data)  # fmt: skip


@pytest.mark.parametrize(
    ("levels", "codes", "message"),
    [
        ([0.0, 1.0], [0], "every level has one code"),
        ([], [], "every level has one code"),
        ([0.0, 1.0], [1, 1], "distinct"),
        ([0.0, 1.0], [0, -1], "distinct"),
        ([0.0, 0.0], [0, 1], "not all zero"),
        ([0.0, NAN], [0, 1], "finite"),
        ([0.5, 1.0], [0, 1], "0 must be among them"),
        ([0.0, 1e-30, 1.0], [0, 1, 2], "one unit"),
    ],
)
def test_levels_that_make_no_set(levels: list[float], codes: list[int], message: str) -> None:
    one, table = torch.tensor(1.0), (torch.tensor(levels), torch.tensor(codes))
    with pytest.raises(CompatError, match=message):
        quantize_APoT(torch.rand(3), one, one, *table)


def test_a_number_between_given_codes_is_none() -> None:
    one, levels = torch.tensor(1.0), torch.tensor([0.0, 0.5, 1.0])
    quantizer = APoTQuantizer(one, one, levels, torch.tensor([0, 7, 9]))
    known = TensorAPoT(quantizer, torch.tensor([9, 0, 7]))
    assert quantizer.dequantize(known).tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(TensorError, match="not all among level_indices"):
        quantizer.dequantize(TensorAPoT(quantizer, torch.tensor([9, 8])))


def test_codes_and_inputs_that_are_refused() -> None:
    quantizer = APoTQuantizer(*qparams())
    for codes in ([16], [-1], [10**6]):
        with pytest.raises(TensorError, match="not all among level_indices"):
            quantizer.dequantize(TensorAPoT(quantizer, torch.tensor(codes)))
    with pytest.raises(TensorError, match="integer tensor"):
        quantizer.dequantize(TensorAPoT(quantizer, torch.rand(3)))
    with pytest.raises(TensorError, match="TensorAPoT is wanted"):
        quantizer.dequantize(torch.tensor([1]))  # type: ignore[arg-type]
    for x in (torch.tensor([1, 2]), 0.5):
        with pytest.raises(TensorError, match="floating-point tensor"):
            quantizer.quantize(x)  # type: ignore[arg-type]
    two = APoTQuantizer(torch.ones(2), *qparams()[1:])
    with pytest.raises(TensorError, match="one value"):
        two.quantize(torch.rand(3))


@pytest.mark.parametrize("place", range(4))
def test_a_missing_qparam_is_named(place: int) -> None:
    table: list[object] = list(qparams())
    table[place] = None
    name = ("alpha", "gamma", "quantization_levels", "level_indices")[place]
    with pytest.raises(TensorError, match=f"{name} is of type NoneType; pass alpha, gamma"):
        quantize_APoT(torch.rand(3), *table)  # type: ignore[arg-type]


def test_other_wrong_qparams() -> None:
    alpha, gamma, levels, codes = qparams()
    with pytest.raises(TensorError, match=r"level_indices .* is torch\.float32; an integer tensor"):
        quantize_APoT(torch.rand(3), alpha, gamma, codes, levels)
    bad = {"is NaN": torch.tensor(NAN), r"shape \(3,\); one value": torch.ones(3)}
    for message, wrong in bad.items():
        quantizer = APoTQuantizer(wrong, gamma, levels, codes)
        for use in (quantizer.q_apot_alpha, lambda q=quantizer: q.quantize(torch.rand(3))):
            with pytest.raises(TensorError, match=f"alpha.*{message}"):
                use()


def test_what_is_no_tensor_of_codes() -> None:
    for value in (torch.tensor([1, 2]), None):
        with pytest.raises(TensorError, match="a TensorAPoT is wanted"):
            dequantize_APoT(value)  # type: ignore[arg-type]
    for data in ([1, 2], None, torch.rand(2)):
        with pytest.raises(TensorError, match=r"apot_data is .*; an integer tensor is wanted"):
            TensorAPoT(APoTQuantizer(*qparams()), data)  # type: ignore[arg-type]
    for x in ("a", None):
        with pytest.raises(TensorError, match="x is of type"):
            float_to_apot(x, *qparams()[2:], 1.0)  # type: ignore[arg-type]


# The quantizer and its tensor --------------------------------------------------------------------


def test_q_apot_alpha_is_the_alpha_in_use() -> None:
    assert APoTQuantizer(*qparams(alpha=100.25)).q_apot_alpha() == 100.25
    least = APoTQuantizer(*qparams(alpha=0.0))
    assert least.q_apot_alpha() == 2.0**-40
    for alpha in (2.0, 1e-30):  # the levels are those of 1
        others = APoTQuantizer(torch.tensor([alpha]), *qparams()[1:])
        assert others.q_apot_alpha() == others.quant_dequant(torch.tensor(9.0)) == 1.0


def test_tensor_shows_moves_copies_and_keeps_its_state() -> None:
    x = torch.rand(2, 3)
    t = quantize_APoT(x, *qparams(alpha=2.0))
    assert repr(t).startswith("TensorAPoT(tensor([[") and "alpha=2, 16 levels" in repr(t)
    assert t.int_repr() is t.data
    copies = [copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.to("cpu"),
              TensorAPoT.from_state_dict(t.state_dict())]  # fmt: skip
    for other in copies:
        assert torch.equal(other.int_repr(), t.int_repr())
        assert torch.equal(dequantize_APoT(other), dequantize_APoT(t))
    moved = t.to("meta")
    assert moved.data.is_meta and moved.quantizer.alpha.is_meta
    with pytest.raises(StateError, match="'data' is missing"):
        TensorAPoT.from_state_dict({k: v for k, v in t.state_dict().items() if k != "data"})


# Scalar rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "k"), [(4, 2), (8, 2), (12, 4)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 100.23])
def test_scalars_and_tensors_agree_with_the_quantizer(
    b: int, k: int, signed: bool, alpha: float
) -> None:
    a, gamma, levels, codes = qparams(b, k, signed, alpha)
    x = alpha * torch.linspace(-1.2, 1.2, 41)
    wanted = quantize_APoT(x, a, gamma, levels, codes).data.tolist()
    assert float_to_apot(x, levels, codes, a).tolist() == wanted
    assert [int(float_to_apot(v, levels, codes, alpha)) for v in x.tolist()] == wanted
    values = quant_dequant_util(x, levels, codes)
    assert [quant_dequant_util(v, levels, codes).item() for v in x.tolist()] == values.tolist()
    assert set(values.tolist()) <= set(levels.tolist()) or (b, signed) == (12, True)
    back = apot_to_float(torch.tensor(wanted), levels, codes)
    torch.testing.assert_close(back, values, rtol=3e-7, atol=0)
    assert apot_to_float(wanted[0], levels, codes).item() == back[0].item()


def test_lists_do_as_well() -> None:
    assert int(float_to_apot(0.3, [0.0, 0.25, 1.0], [0, 2, 1], 1.0)) == 2  # type: ignore[arg-type]
