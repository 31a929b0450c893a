"""torch's attention and transformer modules, written out: torch's bits, keys and objects."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrize

import apot_fx
from apot_fx.nn import EXPANDED, Expanded, attend, expand_attention, restore_attention
from apot_fx.passes import trace

EMBED, HEADS, BATCH = 12, 4, 3


@pytest.fixture(autouse=True, scope="module")
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Caller(nn.Module):
    """Calls a module in some way: a root that can be traced with plain arguments."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None, e: Any = None) -> Any:
        return self.call(self.inner, a, b, c, d, e)


def expanded(module: nn.Module) -> Any:
    """A copy that is written out."""
    twin = copy.deepcopy(module)
    assert "" in expand_attention(twin)
    return twin


def noisy(module: Any) -> Any:
    """Biases too get values: torch starts them at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def run(module: nn.Module, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of inputs and parameters, from one seed."""
    module.zero_grad()
    own = [arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args]
    torch.manual_seed(3)
    found = module(*own)
    outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y is not None]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    named = [*((f"input {n}", x) for n, x in enumerate(own)), *module.named_parameters()]
    grads = {name: x.grad for name, x in named if x.grad is not None}
    return {**grads, **{f"output {n}": y for n, y in enumerate(outputs)}}


def assert_same(module: nn.Module, call: Callable[..., Any], *args: torch.Tensor) -> None:
    """A module as torch has it, written out, and its graph: the same bits and strides.

    Without batch axis gradients, and outputs of the graph, only up to rounding.
    """
    root = Caller(module, call)
    theirs = run(root, *args)
    assert "inner" in expand_attention(root)
    for form in (root, fx.symbolic_trace(root)):
        mine = run(form, *args)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            output = "output" in name
            assert not output or value.stride() == theirs[name].stride(), name
            exact = args[0].dim() == 3 or (output and form is root)
            limits = {"rtol": 0.0, "atol": 0.0} if exact else {}
            torch.testing.assert_close(value, theirs[name], equal_nan=True, **limits)
    restore_attention(root)


FLAGS = (
    "bias add_bias_kv add_zero_attn batch_first batched need_weights average_attn_weights train "
    "dropout"
).split()
OPTIONS = st.fixed_dictionaries(
    {
        **{flag: st.booleans() for flag in FLAGS},
        "inputs": st.sampled_from(["self", "cross", "three", "query twice", "other sizes"]),
        "mask": st.sampled_from(["", "bool", "float", "heads", "causal", "hint"]),
        "padding": st.sampled_from(["", "bool", "float"]),
        "times": st.sampled_from([(1, 1), (5, 7), (5, 5), (40, 33)]),
    }
)


def mask_of(kind: str, targets: int, sources: int, batch: int) -> torch.Tensor:
    if kind == "bool":
        return torch.rand(targets, sources) > 0.7
    if kind == "heads":
        return torch.randn(batch * HEADS, targets, sources)
    if kind in ("causal", "hint"):
        return torch.full((targets, sources), -torch.inf).triu(1)
    return torch.randn(targets, sources) if kind else torch.zeros(())


def attention_call(options: dict[str, Any]) -> Callable[..., Any]:
    def call(m: Any, q: Any, k: Any, v: Any, mask: Any, padding: Any) -> Any:
        k = {"self": q, "query twice": q}.get(options["inputs"], k)
        return m(
            q,
            k,
            {"self": q, "cross": k}.get(options["inputs"], v),
            attn_mask=mask if options["mask"] else None,
            key_padding_mask=padding if options["padding"] else None,
            is_causal=options["mask"] == "hint",
            need_weights=options["need_weights"],
            average_attn_weights=options["average_attn_weights"],
        )

    return call


@given(OPTIONS)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_attention_has_the_bits_and_gradients_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    others = options["inputs"] == "other sizes"
    targets, sources = options["times"]
    sources = targets if options["inputs"] in ("self", "query twice") else sources
    batch = BATCH if options["batched"] else 1
    layer = nn.MultiheadAttention(
        EMBED,
        HEADS,
        dropout=0.4 if options["dropout"] else 0.0,
        kdim=7 if others else None,
        vdim=9 if others else None,
        **{key: options[key] for key in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")},
    )

    def sequence(time: int, features: int) -> torch.Tensor:
        if not options["batched"]:
            return torch.randn(time, features, requires_grad=True)
        sizes = (batch, time) if options["batch_first"] else (time, batch)
        return torch.randn(*sizes, features, requires_grad=True)

    padding = torch.rand(batch, sources)
    if options["padding"] == "bool":
        padding = padding > 0.7
    assert_same(
        noisy(layer).train(options["train"]),
        attention_call(options),
        sequence(targets, EMBED),
        sequence(sources, 7 if others else EMBED),
        sequence(sources, 9 if others else EMBED),
        mask_of(options["mask"], targets, sources, batch),
        padding if options["batched"] else padding[0],
    )


LAYER_OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_first": True, "batch_first": True, "activation": "gelu"},
    {"activation": nn.SiLU(), "bias": False, "batch_first": True},
    {"activation": functional.gelu, "dropout": 0.0},
    {"activation": torch.tanh, "norm_first": True, "bias": False, "layer_norm_eps": 1e-3},
]
IDS: dict[str, Any] = {"ids": lambda value: "-".join(map(str, value)) or "default"}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
PADDING = torch.arange(6) >= torch.tensor([[6], [4], [2]])
LAYER_CALLS: list[Callable[..., Any]] = [
    lambda m, x, *_: m(x),
    lambda m, x, mask, *_: m(x, mask),
    lambda m, x, mask, *_: m(x, mask, is_causal=True),
    lambda m, x, mask, padding, *_: m(x, None, padding),
    lambda m, x, mask, padding, *_: m(x, mask.isinf(), src_key_padding_mask=padding),
]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", LAYER_OPTIONS, **IDS)
def test_encoders_have_the_bits_of_torch(options: dict[str, Any], train: bool) -> None:
    torch.manual_seed(0)
    layer = noisy(nn.TransformerEncoderLayer(EMBED, HEADS, 20, **options))
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(EMBED), enable_nested_tensor=False)
    sizes = (BATCH, 6) if options.get("batch_first") else (6, BATCH)
    x = torch.randn(*sizes, EMBED, requires_grad=True)
    for module in (layer.train(train), stack.train(train)):
        for call in LAYER_CALLS:
            assert_same(module, call, x, CAUSAL, PADDING)
        assert_same(module, LAYER_CALLS[1], x.flatten(0, 1)[:6], CAUSAL)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", LAYER_OPTIONS, **IDS)
def test_decoders_have_the_bits_of_torch(options: dict[str, Any], train: bool) -> None:
    torch.manual_seed(0)
    layer = noisy(nn.TransformerDecoderLayer(EMBED, HEADS, 20, **options))
    whole = noisy(nn.Transformer(EMBED, HEADS, 1, 2, 20, **options))
    x, memory = (torch.randn(6, 6, EMBED, requires_grad=True) for _ in range(2))
    padding = PADDING.repeat(2, 1)
    calls: list[Callable[..., Any]] = [
        lambda m, x, y, *_: m(x, y),
        lambda m, x, y, mask, pad, _: m(x, y, tgt_mask=mask, memory_key_padding_mask=pad),
        lambda m, x, y, mask, *_: m(x, y, tgt_mask=mask, memory_mask=mask, tgt_is_causal=True),
    ]
    for module in (layer, nn.TransformerDecoder(layer, 2, nn.LayerNorm(EMBED)), whole):
        for call in calls:
            assert_same(module.train(train), call, x, memory, CAUSAL, padding)


@pytest.mark.parametrize("time", [33, 130, 600])
def test_a_causal_mask_that_torch_detects_gives_the_same_bits_as_any_mask(time: int) -> None:
    """torch compares the mask's values and drops it for the causal form; here it is added."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 20, batch_first=True)
    stack = nn.TransformerEncoder(layer, 1).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(time)
    x = torch.randn(2, time, EMBED)
    assert torch.equal(expanded(stack)(x, mask), stack(x, mask))


def test_padded_positions_are_computed_where_torch_has_a_nested_path() -> None:
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(EMBED, HEADS, 20, batch_first=True), 2
    ).eval()
    x = torch.randn(BATCH, 6, EMBED)
    with torch.no_grad():
        mine = expanded(stack)(x, src_key_padding_mask=PADDING)
        torch.backends.mha.set_fastpath_enabled(True)
        theirs = stack(x, src_key_padding_mask=PADDING)
        torch.backends.mha.set_fastpath_enabled(False)
    assert theirs[PADDING].eq(0).all() and mine[PADDING].ne(0).any()
    torch.testing.assert_close(mine[~PADDING], theirs[~PADDING])


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_graph_takes_any_batch_time_and_rank(batch_first: bool) -> None:
    layer = expanded(nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first))
    graph = fx.symbolic_trace(Caller(layer, lambda m, x, *_: m(x, x, x)))
    for sizes in ((5,), (2, 3), (7, 1), (1, 4)):
        x = torch.randn(*sizes, EMBED)
        for mine, theirs in zip(graph(x), layer(x, x, x), strict=True):
            assert mine.shape == theirs.shape and torch.equal(mine, theirs)


def test_bfloat16_and_autocast() -> None:
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    twin, x, mask = expanded(layer), torch.randn(2, 6, EMBED), CAUSAL.isinf()
    with torch.autocast("cpu", torch.bfloat16):
        for need in (True, False):
            mine, theirs = (m(x, x, x, attn_mask=mask, need_weights=need)[0] for m in (twin, layer))
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    x = x.bfloat16()
    mine, theirs = (m.bfloat16()(x, x, x, attn_mask=mask)[0] for m in (twin, layer))
    assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_the_tracer_records_one_live_dropout_and_one_product_of_attention() -> None:
    layer = expanded(nn.MultiheadAttention(EMBED, HEADS, dropout=0.5)).eval()
    stage = trace(Caller(layer, lambda m, x, *_: m(x, x, x, need_weights=False)))
    (call,) = (node for node in stage.graph.nodes if node.target is attend)
    assert call.kwargs["training"] is False and not stage.apot.reports[0].left
    stage = trace(Caller(layer, lambda m, x, *_: m(x, x, x)))
    assert functional.dropout in {node.target for node in stage.graph.nodes}
    layer.dropout = 0.0
    stage = trace(Caller(layer, lambda m, x, *_: m(x, x, x, need_weights=False)))
    targets = [node.target for node in stage.graph.nodes]
    assert targets.count(functional.scaled_dot_product_attention) == 1


@pytest.mark.parametrize("example", [True, False])
def test_projections_become_quantized_layers(example: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, EMBED), torch.randn(2, 6, EMBED)
    model = expanded(nn.Transformer(EMBED, HEADS, 1, 1, 20, dropout=0.0, batch_first=True)).eval()
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=(x, y) if example else None)
    quantized = {row["name"] for row in apot_fx.explain(prepared).rows if row["weight"]}
    attentions = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn")
    cross = "decoder.layers.0.multihead_attn"
    assert quantized == {
        *(f"{path}.{name}" for path in (*attentions, cross) for name in ("in_proj", "out_proj")),
        f"{cross}.in_proj_0",
        *(f"{kind}.layers.0.linear{n}" for kind in ("encoder", "decoder") for n in (1, 2)),
    }
    assert set(model.state_dict()) <= set(prepared.state_dict())
    apot_fx.calibrate(prepared, [(x, y)], progress=False)
    converted = apot_fx.convert_apot(prepared)
    apot_fx.check_parity(prepared, converted, [(y, x)]).raise_if_failed()


def test_keys_objects_and_classes_stay() -> None:
    model = nn.ModuleDict({"a": nn.Transformer(EMBED, HEADS, 1, 1, 20)})
    model["again"] = model["a"]
    model["attention"] = model["a"].encoder.layers[0].self_attn
    model["a"].register_forward_hook(lambda *_: None)
    before, keys, parts = copy.deepcopy(model), list(model.state_dict()), list(model.modules())
    names = expand_attention(model)
    assert "a" in names and "a.decoder.layers.0.multihead_attn" in names and "again" not in names
    assert list(model.state_dict()) == keys and list(map(id, model.modules())) == list(
        map(id, parts)
    )
    assert model["again"] is model["a"] and isinstance(model["attention"], Expanded)
    assert isinstance(model["a"], nn.Transformer) and model["a"]._forward_hooks
    assert not any(type(module) in EXPANDED for module in model.modules())
    model.load_state_dict(before.state_dict(), strict=True)
    before.load_state_dict(model.state_dict(), strict=True)
    assert expand_attention(model) == []
    assert restore_attention(model) == names
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_copies_and_pickles() -> None:
    layer = expanded(noisy(nn.TransformerEncoderLayer(EMBED, HEADS, 20))).eval()
    x, file = torch.randn(6, BATCH, EMBED), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))


def test_what_computes_something_else_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    replaced = nn.TransformerEncoderLayer(EMBED, HEADS, 20)
    replaced._ff_block = lambda x: x  # type: ignore[method-assign]
    patched = nn.MultiheadAttention(EMBED, HEADS)
    patched.forward = lambda *args: args  # type: ignore[method-assign]
    computed = nn.MultiheadAttention(EMBED, HEADS)
    parametrize.register_parametrization(computed, "in_proj_weight", nn.Identity())
    model = nn.ModuleList([Own(EMBED, HEADS), replaced, patched, computed])
    assert expand_attention(model) == ["1.self_attn"]


X, Y = torch.randn(5, BATCH, EMBED), torch.randn(7, BATCH, EMBED)
BAD: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "features": ((X[..., :4], X, X), {}),
    "batch": ((X, Y[:, :1], Y[:, :1]), {}),
    "ranks": ((X, Y[:, 0], Y[:, 0]), {}),
    "rank 4": ((X[None], X[None], X[None]), {}),
    "times": ((X, Y, X), {}),
    "mask sizes": ((X, Y, Y), {"attn_mask": torch.zeros(7, 5)}),
    "one row": ((X, Y, Y), {"attn_mask": torch.zeros(1, 7)}),
    "heads": ((X, Y, Y), {"attn_mask": torch.zeros(1, 5, 7)}),
    "padding": ((X, Y, Y), {"key_padding_mask": torch.zeros(BATCH, 5)}),
    "padding rank": ((X, Y, Y), {"key_padding_mask": torch.zeros(7)}),
    "integers": ((X, Y, Y), {"attn_mask": torch.zeros(5, 7, dtype=torch.long)}),
    "hint alone": ((X, Y, Y), {"is_causal": True}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_what_torch_refuses_is_refused(case: str, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(EMBED, HEADS)
    args, options = BAD[case]
    for module in (layer, expanded(layer)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            module(*args, need_weights=need_weights, **options)


def test_an_example_without_batch_axis_gives_torchs_bits_and_a_graph_for_all_ranks() -> None:
    torch.manual_seed(0)
    layer = noisy(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    x = torch.randn(7, 8)
    root = Caller(expanded(layer), lambda m, x, *_: m(x, x, x, need_weights=False)[0])
    stage = trace(root, (x,))
    assert torch.equal(stage(x), layer(x, x, x, need_weights=False)[0])
    both = torch.randn(2, 7, 8)
    torch.testing.assert_close(stage(both), layer(both, both, both)[0])


def test_an_activation_that_is_a_module_survives_copies() -> None:
    """torch's decoder layer puts relu in its place whenever it is copied."""
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 20, activation=nn.SiLU()).eval()
    x = torch.randn(6, BATCH, EMBED)
    expected = layer(x, x)
    expand_attention(layer)
    assert torch.equal(copy.deepcopy(layer)(x, x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, x), expected)
