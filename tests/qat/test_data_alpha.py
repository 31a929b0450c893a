"""α of the data: the short way to its gradient against the long one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx.kernels.eager import quantized_data
from tests.nets import calibrated, seeded

LAYERS = {
    "conv": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "reflect": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3, dilation=2),
    "same": lambda: nn.Conv2d(3, 4, 2, padding="same"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("alpha", [None, 2.0**-41])
def test_alpha_gets_the_gradient_that_it_had_with_the_data_s(
    layer: str, alpha: float | None
) -> None:
    def net() -> nn.Module:
        return nn.Sequential(LAYERS[layer](), nn.BatchNorm2d(LAYERS[layer]().out_channels))

    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    model = calibrated(seeded(net), [x], apot_fx.QConfig.from_preset("w4a4")).train()
    fake_quant = model.get_submodule("activation_post_process_0")
    clip = fake_quant.get_parameter("alpha")
    with torch.no_grad():
        clip.mul_(0.7) if alpha is None else clip.fill_(alpha)
    found = []
    for data in (x, x.clone().requires_grad_()):
        assert (quantized_data(fake_quant(data)) is not None) == (data is x)
        model.zero_grad()
        (model(data) * torch.linspace(-1, 2, 10)[: model(data).shape[-1]]).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    short, long = found
    for name, grad in long.items():
        if name == "activation_post_process_0.alpha":
            torch.testing.assert_close(short[name], grad, rtol=2e-4, atol=1e-6)
            assert alpha is not None or grad != 0
        else:
            assert (grad is None and short[name] is None) or torch.equal(short[name], grad)


def test_what_else_reads_the_data_adds_to_the_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) * self.b(x.flip(2))

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = calibrated(seeded(Net), [x], apot_fx.QConfig.from_preset("w4a4")).train()
    grads = []
    for data in (x, x.clone().requires_grad_()):
        model.zero_grad()
        model(data).square().sum().backward()
        grads.append(model.get_parameter("activation_post_process_0.alpha").grad)
    torch.testing.assert_close(*grads, rtol=2e-4, atol=1e-6)


def first_layer() -> tuple[nn.Module, torch.Tensor, torch.nn.Parameter]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = calibrated(seeded(LAYERS["conv"]), [x], apot_fx.QConfig.from_preset("w4a4")).train()
    return model, x, model.get_parameter("activation_post_process_0.alpha")


def test_nan_in_rows_that_the_loss_leaves_out() -> None:
    model, x, alpha = first_layer()
    x[3] = float("nan")
    grads = []
    for data in (x, x.clone().requires_grad_()):
        alpha.grad = None
        model(data)[:3].square().sum().backward()
        grads.append(alpha.grad)
    torch.testing.assert_close(*grads, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["data", "alpha"])
def test_what_changes_before_the_gradients_is_refused(what: str) -> None:
    model, x, alpha = first_layer()
    loss = model(x).square().sum()
    with torch.no_grad():
        (x if what == "data" else alpha).mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_on_the_quantized_data_see_its_gradient() -> None:
    model, x, _ = first_layer()
    seen: list[torch.Tensor] = []

    def watch(module: nn.Module, args: object, y: torch.Tensor) -> None:
        y.register_hook(seen.append)

    model.get_submodule("activation_post_process_0").register_forward_hook(watch)
    model(x).square().sum().backward()
    assert len(seen) == 1 and seen[0].shape == x.shape
