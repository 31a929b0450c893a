"""A step of quantization-aware training against a float step, and where the rest goes.

Run alone (`python benchmarks/qat.py`) or by `make bench`. Ratios of medians in one run; the A/A
column is the float step against itself. The bound is what a float step and the bytes that
fake-quants touch take together, at the speed of a copy into kept memory: 8 bytes forward and 12
backward for each element. Writes `benchmarks/qat.json`. `OMP_WAIT_POLICY=passive` where other work
runs on the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from ratios import medians
from torch import nn
from torch.profiler import profile
from zoo import declare_torchvision_operators

import apot_fx
from apot_fx.fake_quant import FakeQuantize
from apot_fx.kernels import status
from apot_fx.table import Table

#: What the parts of a step are called in the profile.
PARTS = {
    "fake-quant": "_FakeQuantize",
    "its gradient": "_FakeQuantizeBackward",
}


def resnet(batch: int, size: int) -> tuple[nn.Module, torch.Tensor]:
    declare_torchvision_operators()
    import torchvision

    return torchvision.models.resnet18(num_classes=10), torch.randn(batch, 3, size, size)


def encoder(needs_gradient: bool) -> tuple[nn.Module, torch.Tensor]:
    """A block as the first, whose input takes no gradient, or as one of many."""
    block = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    return block, torch.randn(8, 128, 512, requires_grad=needs_gradient)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "ResNet-18, 8 x 224²": lambda: resnet(8, 224),
    "ResNet-18, 32 x 64²": lambda: resnet(32, 64),
    "encoder block 512, first": lambda: encoder(False),
    "encoder block 512, inner": lambda: encoder(True),
}


def stepper(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def touched_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the fake-quants of one step read and write."""
    counts: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: counts.append(args[0].numel()))
        for module in model.modules()
        if isinstance(module, FakeQuantize)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return 20 * sum(counts)


def copy_seconds_per_byte() -> float:
    """Of reading and writing, from memory."""
    source, kept = torch.randn(2**24), torch.empty(2**24)
    return medians(lambda: kept.copy_(source))[0] / 1e3 / (2 * 4 * 2**24)


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Share of a step's processor time that each part takes."""
    with profile() as seen:
        for _ in range(3):
            step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return {part: times.get(name, 0) / sum(times.values()) for part, name in PARTS.items()}


def row(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    prepared = apot_fx.prepare_apot(model, "w4a4")
    apot_fx.calibrate(prepared, [x.detach()], progress=False)
    float_step, step = stepper(model.train(), x), stepper(prepared.train(), x)
    base, again, ours = medians(float_step, float_step, step, rounds=9)
    moved = 1e3 * touched_bytes(prepared, x) * copy_seconds_per_byte()
    return {
        "model": name,
        "float ms": f"{base:.1f}",
        "A/A": f"{again / base:.2f}",
        "QAT / float": f"{ours / base:.3f}",
        "bound": f"{1 + moved / base:.3f}",
        **{part: f"{100 * share:.1f} %" for part, share in shares(step).items()},
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found = [row(name) for name in MODELS]
    notes = [f"{torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {status()}"]
    table = Table(tuple(found[0]), found, title="QAT steps, w4a4", notes=notes)
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
