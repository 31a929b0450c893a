"""The pass on whole models: what it takes, what it leaves and why, and parity of all of it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, WeightSpec
from apot_fx.errors import CalibrationError, ConfigError, StateError
from apot_fx.nn import ConvertedPairOp, PreparedPairOp, PreparedProduct
from apot_fx.passes.stage import StageModule
from apot_fx.values import same_bits
from tests.nets import seeded

OPTION = QConfig(WeightSpec(4), ActivationSpec(4, products=8))
Fn = Callable[..., torch.Tensor]


class Heads(nn.Module):
    """Projections to two heads, a function of them, a projection out."""

    def __init__(self, fn: Fn, shared: int = 2) -> None:
        super().__init__()
        self.fn = fn
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4 * shared), nn.Linear(8, 4 * shared)
        self.out = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.randn(5, 5))

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in parts)
        y = self.fn(self, q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


def sdpa(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def masked(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)


def causal(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def computed_mask(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    far = (self.table[: q.size(-2)] > 0.5) | torch.eye(5, dtype=torch.bool)
    return functional.scaled_dot_product_attention(q, k, v, far, scale=q.size(-1) ** -0.5)


def explicit(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    weights = (q @ k.mT / math.sqrt(4)).softmax(-1)
    return torch.matmul(self.drop(weights), v)


def explicit_masked(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    scores = q.matmul(k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1) @ v


def einsums(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij, bhjd -> bhid", [weights, v])


def batched(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    start = torch.empty(1, 1, 1)
    weights = torch.baddbmm(start, q, k.transpose(1, 2), beta=0, alpha=0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, 2))


def batched_masked(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = torch.baddbmm(self.table, q, k.mT, alpha=0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, 2))


def gram(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    q = q.relu()
    return torch.mm(q.flatten(0, 2).t(), q.flatten(0, 2)).sum(0) + v[..., :1]


#: Function, number of products, which of their fake-quants are unsigned.
FORWARDS: dict[Fn, tuple[int, list[bool]]] = {
    sdpa: (1, [True, True, True]),
    masked: (1, [True, True, True]),
    causal: (1, [True, True, True]),
    grouped: (1, [True, True, True]),
    computed_mask: (1, [True, True, True]),
    explicit: (2, [True, True, False, True]),
    explicit_masked: (2, [True, True, False, True]),
    einsums: (2, [True, True, False, True]),
    batched: (2, [True, True, False, True]),
    batched_masked: (2, [True, True, False, True]),
    gram: (1, [False, False]),
}


def batches(fn: Fn) -> list[Any]:
    torch.manual_seed(5)
    x = [torch.randn(2, 5, 8) for _ in range(2)]
    mask = torch.rand(5, 5) > 0.4
    mask[1], mask[0, 0] = False, True  # one row sees nothing
    if fn is masked:
        return [(x[0], mask), (x[1], torch.randn(2, 1, 5, 5))]
    return [(each, mask) for each in x] if fn is explicit_masked else [(each,) for each in x]


def model_of(fn: Fn) -> nn.Module:
    return seeded(lambda: Heads(fn, shared=1 if fn is grouped else 2))


def calibrated(fn: Fn) -> StageModule:
    given = batches(fn)
    prepared = apot_fx.prepare_apot(model_of(fn), OPTION, given[0])
    apot_fx.calibrate(prepared, given, forward=lambda model, batch: model(*batch))
    return prepared.eval()


def pair_ops(stage: nn.Module) -> list[PreparedPairOp | ConvertedPairOp]:
    return [m for m in stage.modules() if isinstance(m, (PreparedPairOp, ConvertedPairOp))]


def names(fns: Any) -> list[str]:
    return [fn.__name__ for fn in fns]


@pytest.mark.parametrize("fn", FORWARDS, ids=names(FORWARDS))
def test_parity(fn: Fn) -> None:
    count, signs = FORWARDS[fn]
    prepared = calibrated(fn)
    assert isinstance(prepared, StageModule)
    assert len(pair_ops(prepared)) == count
    found = [
        prepared.get_submodule(str(grid.target)).signed
        for node in prepared.graph.nodes
        if str(node.target).startswith(("apot_product", "apot_attention"))
        for grid in node.args[1]
    ]
    assert found == signs
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, batches(fn))
    assert verdict.ok, verdict.table()
    dtypes = {op: [] for op in pair_ops(converted)}
    handles = [
        op.register_forward_pre_hook(lambda op, args: dtypes[op].extend(x.dtype for x in args[0]))
        for op in dtypes
    ]
    converted(*batches(fn)[0])
    for handle in handles:
        handle.remove()
    assert {dtype for seen in dtypes.values() for dtype in seen} == {torch.uint8}
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(*batches(fn)[0]), converted(*batches(fn)[0]))
    assert converted(*batches(fn)[0]).isfinite().all()


@pytest.mark.parametrize("fn", FORWARDS, ids=names(FORWARDS))
def test_float_bits(fn: Fn) -> None:
    """With the option off, the calls stay; with it on and fake-quants off, their bits do."""
    model = model_of(fn)
    off = QConfig(WeightSpec(4), ActivationSpec(4))
    plain = apot_fx.prepare_apot(model, off, batches(fn)[0])
    assert not pair_ops(plain)
    calls = [n.target for n in plain.graph.nodes if n.op in ("call_function", "call_method")]
    targets = {"scaled_dot_product_attention", "matmul", "einsum", "bmm", "baddbmm", "mm"}
    assert targets & {getattr(target, "__name__", target) for target in calls}
    prepared = calibrated(fn)
    prepared.apply(apot_fx.disable_fake_quant)
    for batch in batches(fn):
        assert same_bits(model(*batch), prepared(*batch))  # NaN too, where nothing is visible


@pytest.mark.parametrize("fn", [sdpa, explicit, einsums], ids=names([sdpa, explicit, einsums]))
def test_trains_from_a_cold_start(fn: Fn) -> None:
    prepared = apot_fx.prepare_apot(model_of(fn), OPTION).train()
    x = torch.randn(2, 5, 8)
    prepared(x).square().sum().backward()
    prepared(x).square().sum().backward()
    for name, parameter in prepared.named_parameters():
        if "weight_fake_quant" not in name:
            assert parameter.grad is not None, name
    prepared.eval()
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x]).ok


class Block(nn.Module):
    """torch's own attention, and what it gives once more with its weights."""

    def __init__(self, dropout: float, mask: bool) -> None:
        super().__init__()
        self.one = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.two = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mask = torch.ones(5, 5).triu(1).bool() if mask else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.one(x, x, x, need_weights=False, attn_mask=self.mask)
        z, weights = self.two(y, y, y, attn_mask=self.mask)
        return z + weights.sum()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mask", [False, True])
def test_torchs_multihead_attention(dropout: float, mask: bool) -> None:
    x = torch.randn(2, 5, 8)
    model = seeded(lambda: Block(dropout, mask))
    prepared = apot_fx.prepare_apot(model, OPTION, x)
    apot_fx.calibrate(prepared, [x])
    assert len(pair_ops(prepared)) == 3
    assert torch.equal(prepared(x), prepared(x))
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x]).ok
    prepared.train()
    assert torch.equal(prepared(x), prepared(x)) is not bool(dropout)
    prepared.apply(apot_fx.disable_fake_quant)
    torch.manual_seed(3)
    y = prepared(x)
    torch.manual_seed(3)
    assert torch.equal(y, model.train()(x))


def test_dropout_in_attention_acts_in_train_alone() -> None:
    def forward(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, None, 0.5)

    prepared = calibrated(forward)
    x = torch.randn(2, 5, 8)
    assert torch.equal(prepared(x), prepared(x))
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [(x,)]).ok
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))


LEFT: list[tuple[Fn, str]] = [
    (lambda s, q, k, v, m: s.table[None] @ v, "one operand is constant"),
    (
        lambda s, q, k, v, m: torch.baddbmm(
            v[:, 0], q[:, 0], k[:, 0, :4], alpha=q.size(0) * 0.5
        ).unsqueeze(1),
        "traced alpha",
    ),
    (lambda s, q, k, v, m: torch.einsum("...ij,...jk->...ik", q @ k.mT, v), "no ellipsis"),
    (lambda s, q, k, v, m: torch.einsum("bhid,bhjd,bhje->bhie", q, k, v), "3 operands"),
    (lambda s, q, k, v, m: torch.einsum(q @ k.mT, [0, 1, 2, 3], v, [0, 1, 3, 4]), "in letters"),
    (
        lambda s, q, k, v, m: functional.scaled_dot_product_attention(
            q, k, v, is_causal=q.size(1) > 1
        ),
        "is traced",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "why"), LEFT, ids=[why.replace(" ", "-") for _, why in LEFT])
def test_left_with_a_reason(fn: Fn, why: str) -> None:
    prepared = apot_fx.prepare_apot(seeded(lambda: Heads(fn)), OPTION)
    rows = [row for row in apot_fx.explain(prepared).rows if why in str(row["why"])]
    assert len(rows) == 1 and rows[0]["form"] == "float"


def test_products_with_parameters_are_layers() -> None:
    def forward(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return functional.linear(q, self.out.weight[:4, :4]) + v

    assert not pair_ops(apot_fx.prepare_apot(seeded(lambda: Heads(forward)), OPTION))


def test_operands_share_a_fake_quant_with_other_readers_of_the_root() -> None:
    """8-bit uniform layers and a second product read the very same indices."""

    def forward(self: Any, q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        first = q @ k.mT
        return first.softmax(-1) @ v + (q @ k.mT).sigmoid() @ self.v(q.flatten(2).repeat(1, 1, 2))[
            ..., :4
        ].unflatten(-1, (4,))  # fmt: skip

    activation = ActivationSpec(8, kind="uniform")
    option = QConfig(WeightSpec(4), ActivationSpec(4, products=8))
    prepared = apot_fx.prepare_apot(
        seeded(lambda: Heads(forward)),
        apot_fx.QConfigMapping.of(option).set_module_name("v", QConfig(WeightSpec(4), activation)),
    )
    by_call = {
        str(node.target): [grid.target for grid in node.args[1]]
        for node in prepared.graph.nodes
        if str(node.target).startswith("apot_product")
    }
    first, again = by_call["apot_product_0"], by_call["apot_product_2"]
    assert first == again and first[0] != first[1]
    v = next(n for n in prepared.graph.nodes if n.target == "v" and n.args[1].target == first[0])
    assert v is not None


def test_rows_of_explain_and_summary() -> None:
    prepared = calibrated(explicit)
    converted = apot_fx.convert_apot(prepared)
    for stage, form in ((prepared, "quantized"), (converted, "integer")):
        (row,) = apot_fx.explain(stage, "apot_product_1").rows
        assert (row["op"], row["form"]) == ("product", form)
        assert "unsigned x uniform8" in str(row["input"]) or "signed=False) x " in str(row["input"])
        rows = {row["layer"]: row for row in apot_fx.summary(stage).rows}
        assert rows["apot_product_0"]["kind"] == "product"
    assert rows["apot_product_0"]["bytes"] == 4
    (row,) = apot_fx.explain(calibrated(sdpa), "apot_attention_0").rows
    assert row["op"] == "attention" and "softmax uniform8" in str(row["input"])


def test_parity_finds_damage() -> None:
    prepared = calibrated(sdpa)
    for damage in ("s", "alpha", "setting"):
        converted = apot_fx.convert_apot(prepared)
        op = next(m for m in converted.modules() if isinstance(m, ConvertedPairOp))
        if damage == "s":
            op.s[1] = torch.nextafter(op.s[1], torch.tensor(1.0))
        elif damage == "alpha":
            op.quantize.alpha.mul_(1.0000002)
        else:
            op.attention = copy.copy(op.attention)
            object.__setattr__(op.attention, "causal", True)
        verdict = apot_fx.check_parity(prepared, converted, batches(sdpa))
        assert verdict.status == "differs" and "apot_attention_0" in str(verdict.table())


def test_state_dicts() -> None:
    prepared = calibrated(sdpa)
    fresh = apot_fx.prepare_apot(model_of(sdpa), OPTION).eval()
    fresh.load_state_dict(prepared.state_dict())
    x = batches(sdpa)[0][0]
    assert torch.equal(fresh(x), prepared(x))
    fresh.load_state_dict(model_of(sdpa).state_dict())  # a float checkpoint
    converted = apot_fx.convert_apot(prepared)
    state = converted.state_dict()
    state["apot_attention_0.s"] = torch.tensor([1.0, math.nan])
    with pytest.raises(StateError, match=r"apot_attention_0\.s: holds NaN"):
        converted.load_state_dict(state)


def test_convert_refuses_a_product_that_never_ran() -> None:
    prepared = apot_fx.prepare_apot(model_of(sdpa), OPTION).eval()
    with pytest.raises(
        CalibrationError, match=r"apot_attention_0 \(its .*post_process never saw a finite value"
    ):
        apot_fx.convert_apot(prepared)


def test_half_precision_models() -> None:
    for fn in (sdpa, explicit):
        prepared = calibrated(fn).to(torch.bfloat16)
        x = torch.randn(2, 5, 8).bfloat16()
        assert prepared(x).dtype == torch.bfloat16
        converted = apot_fx.convert_apot(prepared)
        assert apot_fx.check_parity(prepared, converted, [(x,)]).ok
    assert {type(op) for op in pair_ops(prepared)} == {PreparedProduct}


SWITCHED = [sdpa, explicit, einsums, causal]


@pytest.mark.parametrize("fn", SWITCHED, ids=names(SWITCHED))
def test_switches_export_and_compile(fn: Fn) -> None:
    """Autocast and mkldnn change no bit of the integers; a stage exports."""
    prepared = calibrated(fn)
    converted = apot_fx.convert_apot(prepared)
    x = batches(fn)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert apot_fx.check_parity(prepared, converted, batches(fn)).ok
    expected = converted(*x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert apot_fx.check_parity(prepared, converted, batches(fn)).ok
        assert torch.equal(converted(*x), expected)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*x), expected)
    exported = torch.export.export(converted, x, strict=False).module()
    assert torch.equal(exported(*x), expected)


def test_the_option_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"ActivationSpec\.products"):
        ActivationSpec(products=9)
    assert ActivationSpec(products=6).describe().endswith("products uniform6")
