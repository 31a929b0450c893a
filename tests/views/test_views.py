"""explain and summary: a row for everything, with the truth in it."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx.errors import ConfigError, StageError
from apot_fx.views import stored_bytes
from tests.nets import branches, calibrated


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.both, self.unused = nn.Bilinear(4, 4, 4), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.first(x)).mean((2, 3))
        return self.last(self.both(x, x))


def test_every_layer_has_a_row_and_a_reason() -> None:
    prepared = apot_fx.prepare_apot(Odd(), apot_fx.QConfigMapping.from_preset("w4a4"))
    rows = {row["name"]: row for row in apot_fx.explain(prepared).rows}
    assert rows["first"]["form"] == "quantized" and "uniform8" in rows["first"]["weight"]
    assert rows["both"]["form"] == "float" and "no quantized form" in rows["both"]["why"]
    assert "never called" in rows["unused"]["why"]
    assert "test_views.py" in rows["gelu"]["why"]
    assert rows["activation_post_process_0"]["form"] == "observing"
    own = apot_fx.QConfigMapping.from_preset("w4a4").set_module_name("last", None)
    table = apot_fx.explain(apot_fx.prepare_apot(Odd(), own), "last")
    assert len(table) == 1 and "config" in table.rows[0]["why"]


def test_unknown_names_and_stages() -> None:
    prepared = apot_fx.prepare_apot(Odd())
    with pytest.raises(ConfigError, match="Did you mean 'first'"):
        apot_fx.explain(prepared, "frist")
    with pytest.raises(StageError, match="prepare_apot"):
        apot_fx.explain(Odd())
    with pytest.raises(StageError):
        apot_fx.summary(Odd())


def test_summary_counts_what_is_stored() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    table = apot_fx.summary(converted)
    total = sum(int(row["bytes"]) for row in table.rows)
    quantizers = sum(4 for name, _ in converted.named_buffers() if name.startswith("quantize_"))
    assert stored_bytes(converted) == total + quantizers
    left = {row["layer"]: row for row in table.rows}["left"]
    assert left["bits"] == 4 and left["weight"] == "8x4x3x3"
    assert left["bytes"] == 8 * 4 * 9 // 2 + 8 * 4 * 3


def test_index_rows_of_converted() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    forms = {row["name"]: row["form"] for row in apot_fx.explain(converted).rows}
    assert [form for name, form in forms.items() if name.startswith("cat")] == ["index"]
    assert forms["left"] == "integer" and forms["add"] == "float"


def test_tables_print_and_write() -> None:
    prepared = apot_fx.prepare_apot(Odd())
    table = apot_fx.explain(prepared)
    assert "Odd: prepared" in str(table) and "<table>" in table._repr_html_()
    assert json.loads(table.to_json())["rows"] == table.rows
    found = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["name"] for row in found] == [row["name"] for row in table.rows]


def test_what_stays_in_place_is_said() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return self.layer(x) + self.count

    table = apot_fx.explain(apot_fx.prepare_apot(Counts()))
    assert any("keeps its new value" in str(row["why"]) for row in table.rows)
