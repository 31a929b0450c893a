"""Products of two activations against integer sums in NumPy, and attention against float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from apot_fx import ActivationSpec
from apot_fx.errors import TensorError
from apot_fx.fake_quant import FakeQuantize
from apot_fx.nn import (
    Attention,
    Contraction,
    ConvertedAttention,
    ConvertedProduct,
    PreparedAttention,
    PreparedProduct,
)
from apot_fx.passes.products import spell_out
from tests.numpy_oracle import F32, nearest, step_of

EQUATIONS = (
    "ij,jk->ik", "bij,bjk->bik", "bhid,bhjd->bhij", "i,j->ij", "i,i->", "ij,ij->ij", "ij,ij->i",
    "bij,kj->bki", "ijk,ilm->jl", "ii,ij->j", "ij,kl->il", "aB,Bc", "b i j, b k j", "ij,j",
    "abc,cba->", "bmk,bnk->nmb",
)  # fmt: skip


def quant(signed: bool, alpha: float = 1.5, bits: int = 8) -> FakeQuantize:
    """A frozen fake-quant on a uniform grid."""
    made = FakeQuantize.for_activation(ActivationSpec(bits, kind="uniform", signed=signed)).eval()
    assert made.observer is not None
    made.observer(torch.tensor([-alpha, alpha] if signed else [0.0, alpha]))
    made.freeze()
    with torch.no_grad():
        made.alpha.fill_(alpha)
    return made


def index_of(quant: FakeQuantize, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.apot_fx.quantize(x, quant.clamped_alpha(), quant.level_spec)


def oracle(x: torch.Tensor, quant: FakeQuantize) -> tuple[np.ndarray, np.ndarray]:
    """Integer levels, and the step."""
    levels, alpha = quant.known_level_set().levels, quant.alpha.detach().numpy()
    return nearest(x.numpy(), alpha, levels), step_of(alpha, levels)


def scaled(total: np.ndarray, *steps: np.ndarray) -> np.ndarray:
    """``fl(fl(acc) · fl(step · step)) + 0.0`` of int64 sums."""
    assert total.dtype == np.int64
    return total.astype(F32) * (steps[0] * steps[1]).astype(F32) + F32(0)


def both_forms(op: PreparedProduct, x: Any, quants: Any) -> torch.Tensor:
    """The prepared result in eval, which must be the converted one in bits."""
    op.eval()
    y = op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants)
    converted = ConvertedProduct(op, quants, None)
    z = converted(tuple(index_of(q, v) for q, v in zip(quants, x, strict=True)))
    assert y.dtype == z.dtype and y.stride() == z.stride() and torch.equal(y, z)
    assert not torch.signbit(y[y == 0]).any()
    return y


@st.composite
def matmul_shapes(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes that torch.matmul takes: 1-d operands, batch axes that broadcast, empty ones."""
    size = st.integers(0, 4)
    rows, inner, columns = draw(size), draw(size), draw(size)
    batch = draw(st.lists(st.integers(0, 3), max_size=2))
    keep = draw(st.lists(st.booleans(), min_size=2, max_size=2))
    other = [n if k else 1 for n, k in zip(batch, keep, strict=False)]
    first = draw(st.sampled_from([(inner,), (rows, inner), (*batch, rows, inner)]))
    second = draw(st.sampled_from([(inner,), (inner, columns), (*other, inner, columns)]))
    return first, second


@settings(max_examples=150, deadline=None)
@given(matmul_shapes(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_matmul(shapes: Any, signed_a: bool, signed_b: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=rng) for shape in shapes)
    quants = quant(signed_a, 1.5), quant(signed_b, 0.7, bits=4)
    y = both_forms(PreparedProduct(Contraction("matmul")), (a, b), quants)
    (qa, step_a), (qb, step_b) = oracle(a, quants[0]), oracle(b, quants[1])
    expected = scaled(np.asarray(qa @ qb, dtype=np.int64), step_a, step_b)
    assert y.shape == torch.matmul(a, b).shape and np.array_equal(y.numpy(), expected)


@pytest.mark.parametrize("call", ["mm", "bmm", "baddbmm"])
def test_other_calls(call: str) -> None:
    a, b = (torch.randn(3, 5, 5)[0 if call == "mm" else slice(None)] for _ in range(2))
    quants = quant(True), quant(False)
    contraction = Contraction(call, alpha=0.3 if call == "baddbmm" else 1)
    y = both_forms(PreparedProduct(contraction), (a, b), quants)
    (qa, step_a), (qb, step_b) = oracle(a, quants[0]), oracle(b, quants[1])
    expected = scaled(qa @ qb, step_a, step_b)
    expected = expected * F32(0.3) if call == "baddbmm" else expected
    assert np.array_equal(y.numpy(), expected)
    plain = getattr(torch, call)
    given_ = (torch.randn(3, 5, 5), a, b) if call == "baddbmm" else (a, b)
    options = {"beta": 0, "alpha": 0.3} if call == "baddbmm" else {}
    assert torch.equal(contraction.plain(a, b), plain(*given_, **options))


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_einsum(equation: str, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {letter: int(torch.randint(1, 5, ())) for letter in equation if letter.isalpha()}
    inputs = equation.replace(" ", "").split("->")[0].split(",")
    a, b = (torch.randn([sizes[letter] for letter in labels]) for labels in inputs)
    quants = quant(True), quant(True, 0.4, bits=6)
    spelled = spell_out(equation)
    assert spelled is not None and torch.equal(
        torch.einsum(equation, a, b), torch.einsum(spelled, a, b)
    )
    contraction = Contraction("einsum", spelled)
    y = both_forms(PreparedProduct(contraction), (a, b), quants)
    (qa, step_a), (qb, step_b) = oracle(a, quants[0]), oracle(b, quants[1])
    expected = np.asarray(np.einsum(spelled, qa, qb), dtype=np.int64)
    assert np.array_equal(y.numpy(), scaled(expected, step_a, step_b))
    ones = np.einsum(spelled, np.ones_like(qa), np.ones_like(qb))
    assert contraction.terms(a, b) == np.asarray(ones).flat[0]


def test_einsum_of_size_one_and_empty() -> None:
    contraction = Contraction("einsum", "bij,bjk->bik")
    assert contraction.terms(torch.ones(1, 2, 7), torch.ones(3, 7, 2)) == 7
    assert contraction.terms(torch.ones(2, 2, 1), torch.ones(2, 7, 2)) == 7
    quants = quant(True), quant(True)
    y = both_forms(PreparedProduct(contraction), (torch.ones(2, 3, 0), torch.ones(2, 0, 4)), quants)
    assert y.shape == (2, 3, 4) and not y.any()


@pytest.mark.parametrize("ellipsis", ["...ij,...jk->...ik", "ij->ji", "ij,jk,kl", "i1,1j"])
def test_equations_left(ellipsis: str) -> None:
    assert spell_out(ellipsis) is None


@pytest.mark.parametrize(
    ("signed", "size", "call"),
    [
        ((True, True), 1300, "matmul"),
        ((False, True), 600, "matmul"),
        ((False, False), 300, "einsum"),
    ],
)
def test_wide_sums(signed: tuple[bool, bool], size: int, call: str) -> None:
    """Beyond 2^24 a float32 sum would be wrong; these are surely beyond."""
    torch.manual_seed(0)
    a = 1.4 + 0.1 * torch.rand(3, size)
    b = 1.4 + 0.1 * torch.rand(size, 4)
    quants = quant(signed[0]), quant(signed[1])
    contraction = Contraction(call, "ij,jk->ik" if call == "einsum" else "")
    (qa, step_a), (qb, step_b) = oracle(a, quants[0]), oracle(b, quants[1])
    total = qa @ qb
    assert total.max() > 2**24 and (total.astype(F32).astype(np.int64) != total).any()
    y = both_forms(PreparedProduct(contraction), (a, b), quants)
    assert np.array_equal(y.numpy(), scaled(total, step_a, step_b))


def learnable(x: torch.Tensor, step: torch.Tensor, signed: bool) -> torch.Tensor:
    """Torch's own learnable uniform fake-quant."""
    low, high = (-127, 127) if signed else (0, 255)
    return torch._fake_quantize_learnable_per_tensor_affine(x, step, torch.zeros(1), low, high, 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_torchs_fake_quant(training: bool) -> None:
    """In train, and in eval through the integers; α's is step's over M."""
    torch.manual_seed(1)
    a, b = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    quants = [quant(True, 1.1), quant(False, 1.3)]
    for each in quants:
        each.train()
        each.train(training)
    op = PreparedProduct(Contraction("einsum", "bid,bjd->bij")).train(training)
    upstream = torch.randn(2, 5, 5)
    op((quants[0](a), quants[1](b)), tuple(quants)).backward(upstream)
    twins = [x.detach().clone().requires_grad_() for x in (a, b)]
    steps = [q.step().reshape(1).requires_grad_() for q in quants]
    parts = [learnable(twins[0], steps[0], True), learnable(twins[1], steps[1], False)]
    torch.einsum("bid,bjd->bij", *parts).backward(upstream)
    for x, twin, each, step in zip((a, b), twins, quants, steps, strict=True):
        torch.testing.assert_close(x.grad, twin.grad)
        assert each.alpha.grad is not None and step.grad is not None
        torch.testing.assert_close(
            each.alpha.grad, (step.grad / each.unit)[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("beta", [1, 0.5])
def test_baddbmm_adds_in_float(beta: float) -> None:
    torch.manual_seed(0)
    a, b, start = torch.randn(3, 5, 5), torch.randn(3, 5, 5), torch.randn(5, 5, requires_grad=True)
    quants = quant(True), quant(False)
    op = PreparedProduct(Contraction("baddbmm", alpha=0.3, beta=beta)).eval()
    y = op((quants[0](a), quants[1](b)), quants, addend=start)
    made = ConvertedProduct(op, quants, None)
    assert torch.equal(y, made((index_of(quants[0], a), index_of(quants[1], b)), addend=start))
    (qa, step_a), (qb, step_b) = oracle(a, quants[0]), oracle(b, quants[1])
    added = start.detach().numpy() * F32(beta)
    assert np.array_equal(y.detach().numpy(), scaled(qa @ qb, step_a, step_b) * F32(0.3) + added)
    y.sum().backward()
    assert start.grad is not None and torch.equal(start.grad, torch.full((5, 5), 3 * beta))
    plain = torch.baddbmm(start, a, b, beta=beta, alpha=0.3)
    assert torch.equal(op.contraction.plain(a, b, start), plain)


# attention


def masks(rows: int, columns: int) -> dict[str, torch.Tensor | None]:
    visible = torch.rand(rows, columns) > 0.4
    visible[1] = False  # nothing to see
    visible[0, 0] = True
    return {
        "none": None,
        "bool": visible,
        "float": torch.randn(rows, columns),
        "inf": torch.zeros(rows, columns).masked_fill(~visible, -math.inf),
    }


def attention(options: Attention, dtype: torch.dtype = torch.float32) -> PreparedAttention:
    return PreparedAttention(options, quant(False, 1.0), dtype).eval()


def inputs(heads: int = 2, shared: int = 2) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 5, heads, 4).transpose(1, 2)
    k, v = (torch.randn(2, 6, shared, 4).transpose(1, 2) for _ in range(2))
    return q, k, v


def converted(op: PreparedAttention, x: Any, quants: Any, **others: Any) -> torch.Tensor:
    made = ConvertedAttention(op, quants, None)
    return made(tuple(index_of(q, v) for q, v in zip(quants, x, strict=True)), **others)


@pytest.mark.parametrize("kind", ["none", "bool", "float", "inf", "causal", "gqa"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_forms_agree_and_are_near_float64(kind: str, scale: float | None) -> None:
    torch.manual_seed(2)
    options = Attention(dropout=0.4, causal=kind == "causal", gqa=kind == "gqa")
    mask = masks(5, 6).get(kind)
    x = inputs(4, 2) if options.gqa else inputs()
    quants = quant(True), quant(True, 1.8), quant(True, 2.0)
    op = attention(options)
    y = op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants, mask=mask, scale=scale)
    z = converted(op, x, quants, mask=mask, scale=scale)
    assert y.stride() == z.stride() and torch.equal(y, z) and y.isfinite().all()
    on_grid = [q(v).double() for q, v in zip(quants, x, strict=True)]
    other = mask.double() if mask is not None and mask.is_floating_point() else mask
    wanted = Attention(0.4, options.causal, options.gqa, live=True).plain(
        tuple(on_grid), other, scale, training=False
    )
    # the softmax lies on a grid of step 1/255: each of 6 weights is off by half a step at most
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=6 * 2.0 / 2 / 255)
    assert y.stride() == wanted.stride()


def test_attention_against_integers() -> None:
    torch.manual_seed(3)
    x, quants = inputs(), (quant(True), quant(True, 1.8), quant(True, 2.0))
    op = attention(Attention())
    y = op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants)
    (q, sq), (k, sk), (v, sv) = (oracle(t, quant) for t, quant in zip(x, quants, strict=True))
    scores = scaled(q @ k.swapaxes(-1, -2), sq, sk) * F32(0.5)
    weights = torch.from_numpy(scores).softmax(-1)  # float in both stages
    w, sw = oracle(weights, op.activation_post_process)
    assert np.array_equal(y.numpy(), scaled(w @ v, sw, sv))


def test_attention_without_quantizers_is_torchs() -> None:
    torch.manual_seed(4)
    x, quants = inputs(), (quant(True), quant(True), quant(True))
    op = attention(Attention(dropout=0.3))
    for each in (*quants, op.activation_post_process):
        each.fake_quant_enabled = False
    results = []
    for call in (
        lambda: op(x, quants),
        lambda: functional.scaled_dot_product_attention(*x, dropout_p=0.3),
    ):
        torch.manual_seed(5)
        results.append(call())
    assert torch.equal(*results)


def test_attention_observes_the_softmax_beside_torchs_call() -> None:
    torch.manual_seed(4)
    op = PreparedAttention(
        Attention(), FakeQuantize.for_activation(ActivationSpec(8, kind="uniform"), False)
    ).eval()
    x = inputs()
    assert torch.equal(op(x), functional.scaled_dot_product_attention(*x))
    assert op.activation_post_process.seen
    op.activation_post_process.freeze()
    largest = (x[0] @ x[1].transpose(-1, -2) / 2).softmax(-1).max()
    torch.testing.assert_close(op.activation_post_process.alpha.detach(), largest)


def test_train_attention_masks_and_drops_as_torch_does() -> None:
    """Fully masked rows give zeros and finite gradients; dropout scales what is left."""
    torch.manual_seed(6)
    x = [t.requires_grad_() for t in inputs()]
    quants = quant(True).train(), quant(True).train(), quant(True, 2.0).train()
    op = attention(Attention(dropout=0.5)).train()
    mask = masks(5, 6)["bool"]
    y = op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants, mask=mask)
    assert not y[:, :, 1].any() and y[:, :, 0].any()
    y.square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in x)
    assert op.activation_post_process.alpha.grad is not None
    torch.manual_seed(7)
    first = op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants)
    assert not torch.equal(first, op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants))


def test_train_attention_gradients_are_those_of_torchs_fake_quant() -> None:
    torch.manual_seed(8)
    x = [t.requires_grad_() for t in inputs()]
    quants = quant(True).train(), quant(True, 1.2).train(), quant(True, 2.0).train()
    op = attention(Attention()).train()
    own = op.activation_post_process
    upstream = torch.randn(2, 2, 5, 4)
    op(tuple(q(v) for q, v in zip(quants, x, strict=True)), quants).backward(upstream)
    twins = [t.detach().clone().requires_grad_() for t in x]
    steps = [q.step().reshape(1).requires_grad_() for q in (*quants, own)]
    q, k, v = (learnable(t, step, True) for t, step in zip(twins, steps[:3], strict=True))
    weights = learnable((q @ k.transpose(-1, -2) * 0.5).softmax(-1), steps[3], False)
    (weights @ v).backward(upstream)
    for t, twin in zip(x, twins, strict=True):
        torch.testing.assert_close(t.grad, twin.grad, rtol=1e-4, atol=1e-5)
    for each, step in zip((*quants, own), steps, strict=True):
        assert each.alpha.grad is not None and step.grad is not None
        torch.testing.assert_close(
            each.alpha.grad, (step.grad / each.unit)[0], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_attention_lays_out_as_torch_does(layout: tuple[int, ...]) -> None:
    shape = (2, 3, 5, 4)
    base = torch.randn([shape[axis] for axis in layout])
    q = base.permute([layout.index(axis) for axis in range(4)])
    k, v = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    quants = quant(True), quant(True), quant(True)
    y = attention(Attention())((quants[0](q), quants[1](k), quants[2](v)), quants)
    assert y.stride() == functional.scaled_dot_product_attention(q, k, v).stride()


# state


def test_scales_stay_float32_and_results_take_the_models_dtype() -> None:
    quants = quant(True), quant(True)
    op = PreparedProduct(Contraction("matmul")).eval().to(torch.bfloat16)
    a, b = (torch.randn(4, 4).bfloat16() for _ in range(2))
    y = op((quants[0](a), quants[1](b)), quants)
    made = ConvertedProduct(op, quants, None).half()
    assert y.dtype == torch.bfloat16 and made.s.dtype == torch.float32
    assert torch.equal(y, made((index_of(quants[0], a), index_of(quants[1], b))))
    assert not op.state_dict()
    for each in (quants[1],):  # one in float: torch's product, of the model's dtype
        each.fake_quant_enabled = False
    assert op((quants[0](a), quants[1](b)), quants).dtype == torch.bfloat16


def test_copies_and_pickles() -> None:
    quants = quant(True), quant(True, 0.8), quant(True)
    op = attention(Attention())
    x = inputs()
    indices = tuple(index_of(q, v) for q, v in zip(quants, x, strict=True))
    made = ConvertedAttention(op, quants, None)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(made(indices), twin(indices))
    assert set(made.state_dict()) == {"s", "quantize.alpha"}
    assert "Attention" in repr(made) and "Contraction" in repr(PreparedProduct(Contraction("mm")))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_damaged_scales_are_refused(value: float) -> None:
    made = ConvertedProduct(PreparedProduct(Contraction("mm")), (quant(True), quant(True)), None)
    with pytest.raises(TensorError, match="s: holds"):
        made.check_state({"s": torch.tensor(value)})
