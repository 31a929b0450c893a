"""Train, quantize after training, fine-tune, convert and check, in one table."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import nn
from tqdm import tqdm

from .. import api
from ..errors import MissingPackageError
from ..table import Table
from ..views import stored_bytes
from .models import ResidualNet, SeparableNet

MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": ResidualNet,
    "separable": SeparableNet,
}
PRESETS = ("w4a4", "w3a3")
FLOAT_EPOCHS, TUNING_EPOCHS = 60, 15
_COLUMNS = (
    "model", "form", "accuracy %", "± s.e.", "flips", "bytes", "parity", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in 0 … 1 and labels (N,), in a train and a test part."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def load_digits(seed: int) -> Digits:
    """The 1,797 handwritten digits inside scikit-learn, a third of them held out by label."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise MissingPackageError(
            "the demo's images come with scikit-learn; pip install 'apot_fx[demo]'"
        ) from None
    images, labels = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        images, labels, test_size=1 / 3, random_state=seed, stratify=labels
    )
    train_x, test_x = (torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16 for x in parts[:2])
    train_y, test_y = (torch.tensor(y) for y in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def train(model: nn.Module, digits: Digits, epochs: int, rate: float, seed: int) -> None:
    """An ordinary training loop: AdamW, cosine schedule, images shifted by up to a pixel."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), type(model).__name__, unit="epoch", disable=None, leave=False):
        order = torch.randperm(len(digits.train_x), generator=generator)
        for batch in order.split(64):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            images = digits.train_x[batch].roll(shift, (2, 3))
            loss = functional.cross_entropy(model(images), digits.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


def run(seed: int = 0) -> Table:
    """The whole demo; one row per model and form. Deterministic for a seed."""
    digits = load_digits(seed)
    rows: list[dict[str, object]] = []
    for name, build in MODELS.items():
        rows.extend(_run_model(name, build, digits, seed))
    notes = [
        f"{len(digits.test_x)} held-out images; s.e. is the standard error of the accuracy; "
        "flips are predictions other than the float model's",
        "W3A3 and W4A4 include 8-bit first and last layers; bytes are the state_dict's",
    ]
    return Table(_COLUMNS, rows, title="handwritten digits", notes=notes)


def _run_model(
    name: str, build: Callable[[], nn.Module], digits: Digits, seed: int
) -> list[dict[str, object]]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = build()
    train(model, digits, FLOAT_EPOCHS, 4e-3, seed)
    expected = predictions(model, digits)
    rows = [_row(name, "float", model, expected, expected, digits, "", start)]
    for preset in PRESETS:
        start = time.perf_counter()
        prepared = api.prepare_apot(model, preset)
        api.calibrate(prepared, digits.train_x.split(128), progress=False)
        rows.append(_quantized(name, f"{preset} after training", prepared, expected, digits, start))
        start = time.perf_counter()
        tuned = copy.deepcopy(prepared)
        train(tuned, digits, TUNING_EPOCHS, 2e-3, seed)
        rows.append(_quantized(name, f"{preset} fine-tuned", tuned, expected, digits, start))
    return rows


@torch.no_grad()
def predictions(model: nn.Module, digits: Digits) -> torch.Tensor:
    """The most likely class of every held-out image."""
    return model(digits.test_x).argmax(1)


def _quantized(
    name: str,
    form: str,
    prepared: nn.Module,
    expected: torch.Tensor,
    digits: Digits,
    start: float,
) -> dict[str, object]:
    converted = api.convert_apot(prepared)
    verdict = api.check_parity(prepared, converted, [digits.test_x])
    found = predictions(converted, digits)
    return _row(name, form, converted, found, expected, digits, verdict.status, start)


def _row(
    name: str,
    form: str,
    model: nn.Module,
    found: torch.Tensor,
    expected: torch.Tensor,
    digits: Digits,
    parity: str,
    start: float,
) -> dict[str, object]:
    accuracy = float((found == digits.test_y).double().mean())
    error = (accuracy * (1 - accuracy) / len(found)) ** 0.5
    values = (
        name,
        form,
        f"{100 * accuracy:.1f}",
        f"{100 * error:.1f}",
        int((found != expected).sum()),
        stored_bytes(model),
        parity,
        f"{time.perf_counter() - start:.1f}",
    )
    return dict(zip(_COLUMNS, values, strict=True))
