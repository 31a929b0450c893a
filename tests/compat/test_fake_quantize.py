"""fake_quantize_function and APoTFakeQuantize: values, the gradient's mask, switches, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import apot_fx
from apot_fx.compat import (
    AdaroundFakeQuantizer,
    APoTFakeQuantize,
    APoTObserver,
    dequantize_APoT,
    fake_quantize_function,
    quantize_APoT,
)
from apot_fx.errors import ApotError, TensorError

NAN, INF = float("nan"), float("inf")


def qparams(signed: bool = False, alpha: float = 1.0) -> tuple[torch.Tensor, ...]:
    return APoTObserver(4, 2).calculate_qparams(signed, min_val=0.0, max_val=alpha)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 100.23])
def test_value_and_gradient(signed: bool, alpha: float) -> None:
    table = qparams(signed, alpha)
    clip = table[0].item()
    beyond = torch.nextafter(table[0], torch.tensor(INF)).item()
    given = [-beyond, -clip, -0.4 * clip, -0.0, 0.3 * clip, clip, beyond, 9 * clip, NAN, INF, -INF]
    x = torch.tensor(given, requires_grad=True)
    y = fake_quantize_function.apply(x, *table)
    assert torch.equal(y, dequantize_APoT(quantize_APoT(x, *table)))
    y.backward(torch.arange(1.0, 12.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0]
    assert x.tolist()[:-3] == pytest.approx(given[:-3])


def test_only_x_gets_a_gradient() -> None:
    alpha, gamma, levels, codes = qparams()
    learned = [value.clone().requires_grad_() for value in (alpha, gamma, levels)]
    x = torch.rand(5, requires_grad=True)
    fake_quantize_function.apply(x, *learned, codes).sum().backward()
    assert x.grad is not None and all(value.grad is None for value in learned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape).to(dtype).requires_grad_()
    y = fake_quantize_function.apply(x, *qparams())
    y.sum().backward()
    assert y.dtype == dtype and y.shape == shape and x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_narrow_x_is_compared_with_the_whole_alpha() -> None:
    x = torch.tensor([1.0078125], dtype=torch.bfloat16, requires_grad=True)
    fake_quantize_function.apply(x, *qparams(alpha=1.005)).sum().backward()
    assert x.grad is not None and x.grad.item() == 0


def test_function_compiles_without_graph_breaks() -> None:
    table = qparams()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_function.apply(x, *table).square().sum()

    ours, theirs = (torch.linspace(-2, 2, 41).requires_grad_() for _ in range(2))
    loss(ours).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(theirs).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_calculate_qparams_is_the_observers() -> None:
    fake, observer = APoTFakeQuantize(b=4, k=2), APoTObserver(b=4, k=2)
    for one in (fake.activation_post_process, observer):
        one.min_val, one.max_val = torch.tensor([0.0]), torch.tensor([1.0])
    for signed in (False, True):
        pairs = zip(fake.calculate_qparams(signed), observer.calculate_qparams(signed), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("signed", [False, True])
def test_forward_is_quantize_and_dequantize(signed: bool) -> None:
    torch.manual_seed(0)
    x = 1000 * torch.rand(20) - 500 * signed
    observer = APoTObserver(b=4, k=2)
    observer(x)
    fake = APoTFakeQuantize(b=4, k=2)
    fake.enable_observer()
    fake.enable_fake_quant()
    wanted = dequantize_APoT(quantize_APoT(x, *observer.calculate_qparams(signed)))
    assert torch.equal(fake(x, signed), wanted)
    assert signed == bool((wanted < 0).any())


def test_without_qparams_it_raises() -> None:
    fake = APoTFakeQuantize(b=4, k=2)
    fake.disable_observer()
    with pytest.raises(AssertionError, match="no qparams") as caught:
        fake(torch.rand(20), False)
    assert isinstance(caught.value, ApotError)
    with pytest.raises(AssertionError, match="b=4, k=3"):
        APoTFakeQuantize(b=4, k=3)(torch.rand(2))


def test_switches() -> None:
    fake, x = APoTFakeQuantize(b=4, k=2), torch.tensor([0.3, 1.0])
    fake.disable_fake_quant()
    assert fake(x) is x and fake.alpha == 1
    fake.observer_enabled[0] = 0
    fake.enable_fake_quant()
    assert fake(torch.tensor([7.0])).tolist() == [1.0] and fake.alpha == 1
    fake.enable_observer()
    assert fake(torch.tensor([7.0])).tolist() == [7.0]
    assert fake(torch.empty(0, 2)).shape == (0, 2)


def test_the_librarys_switches_reach_it() -> None:
    fake, x = APoTFakeQuantize(b=4, k=2), torch.tensor([0.3, 1.0])
    model = nn.Sequential(fake, AdaroundFakeQuantizer())
    model(x)
    model.apply(apot_fx.disable_observer)
    fake(torch.tensor([7.0]))
    assert fake.alpha == 1 and model[1].observer_enabled == [0]
    model.apply(apot_fx.disable_fake_quant)
    assert model(x) is x
    model.apply(apot_fx.enable_fake_quant)
    assert fake(torch.tensor([7.0])).tolist() == [1.0] and model[1].fake_quant_enabled == [1]
    model.apply(apot_fx.enable_observer)
    assert fake(torch.tensor([7.0])).tolist() == [7.0]


def test_what_is_refused() -> None:
    for x in ([1.0, 2.0], torch.tensor([1, 2]), torch.ones(2) + 0j):
        with pytest.raises(TensorError, match=r"APoTFakeQuantize: X is .*floating-point tensor"):
            APoTFakeQuantize(b=4, k=2)(x)  # type: ignore[arg-type]
        with pytest.raises(TensorError, match=r"x is .*floating-point tensor is wanted"):
            fake_quantize_function.apply(x, *qparams())
    with pytest.raises(TensorError, match="alpha is of type NoneType"):
        fake_quantize_function.apply(torch.rand(2), None, *qparams()[1:])


def test_state_copies_and_dtypes() -> None:
    fake = APoTFakeQuantize.with_args(b=4, k=2, dtype=torch.qint8)()
    assert fake.dtype == torch.qint8 and APoTFakeQuantize(b=4, k=2).dtype == torch.quint8
    empty = APoTFakeQuantize(b=4, k=2)
    empty.load_state_dict(APoTFakeQuantize(b=4, k=2).state_dict())
    fake(torch.tensor([0.1, 100.23]))
    fake.disable_observer()
    x = torch.rand(9)
    loaded = APoTFakeQuantize(b=4, k=2)
    loaded.load_state_dict(fake.state_dict())
    for other in (loaded, copy.deepcopy(fake), copy.deepcopy(fake).half(), fake.to("cpu")):
        assert torch.equal(other(x), fake(x)) and other.alpha == torch.tensor(100.23)
    loaded.load_state_dict(empty.state_dict())
    assert loaded.alpha is None


def test_it_trains_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), APoTFakeQuantize(b=8, k=2), nn.Linear(8, 1))
    x = torch.rand(64, 4)
    y, first = x.sum(1, keepdim=True), None
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_module_compiles_and_takes_fake_tensors() -> None:
    fake, x = APoTFakeQuantize(b=4, k=2), torch.rand(50)
    assert torch.equal(torch.compile(copy.deepcopy(fake), backend="eager")(x), fake(x))
    fake.disable_observer()
    assert torch.equal(torch.compile(fake, backend="eager", fullgraph=True)(x), fake(x))
    with FakeTensorMode():
        y = APoTFakeQuantize(b=4, k=2)(torch.rand(2, 3, 4).transpose(0, 2), signed=True)
    assert y.shape == (4, 3, 2) and y.stride() == (1, 4, 12)
