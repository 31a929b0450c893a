"""The shelf: bits, bounds, rows; and which samples steps draw."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from apot_fx.ptq.samples import Sample, Samples
from apot_fx.ptq.shelf import Shelf
from apot_fx.values import same_bits, tensors_in

VALUES = [
    torch.randn(5, 3),
    torch.randn(4, 6).t(),
    torch.randn(5, 2).bfloat16(),
    torch.randn(5, dtype=torch.complex64),
    torch.arange(5) > 2,
    torch.tensor(3),
    torch.zeros(0, 4),
    torch.randint(256, (5, 2, 2), dtype=torch.uint8),
]


@pytest.mark.parametrize("limit", [0, 40, 10**9])
def test_what_comes_back_is_what_was_put(limit: int) -> None:
    with Shelf(limit) as shelf:
        value = {"tensors": VALUES, "number": 3, "none": None}
        kept = shelf.put(value)
        expected = [v.clone() for v in VALUES]
        VALUES[0].add_(0)  # nothing shares memory with what was given
        found = kept.take()
        assert same_bits(expected, found["tensors"]) and found["number"] == 3
        assert shelf.held <= limit and (shelf.held + shelf.spilled) == sum(
            v.numel() * v.element_size() for v in VALUES
        )
        found["tensors"][0].fill_(7)  # nor with what was taken
        assert same_bits(expected, kept.take()["tensors"])


@pytest.mark.parametrize("limit", [0, 10**9])
def test_rows(limit: int) -> None:
    value = (torch.randn(5, 3), torch.arange(10).view(5, 2))
    with Shelf(limit) as shelf:
        rows = torch.tensor([4, 0, 0])
        assert same_bits(shelf.put(value).take(rows), tuple(v[rows] for v in value))


def test_modules_stay_themselves_and_other_objects_are_copied() -> None:
    layer, cache = nn.Linear(2, 2), _Cache()
    with Shelf(0) as shelf:
        kept = shelf.put((layer, cache))
        cache.seen.append(1)
        found = kept.take()
        found[1].seen.append(2)
        assert found[0] is layer and kept.take()[1].seen == []


class _Cache:
    def __init__(self) -> None:
        self.seen: list[int] = []


@dataclasses.dataclass
class _Batch:
    x: torch.Tensor
    extra: dict[str, Any]


@pytest.mark.parametrize("limit", [0, 10**9])
def test_objects_lay_their_tensors_on_the_shelf(limit: int) -> None:
    x, y = torch.randn(10, 3), torch.arange(7)
    filled = _Cache()
    filled.seen, filled.again = [x], x
    values = [
        UserDict(a=x, b=UserDict(c=y)),
        _Batch(x, {"y": y, "seen": filled}),
        filled,
    ]
    for value in values:
        with Shelf(limit) as shelf:
            kept = shelf.put(value)
            assert (shelf.held, shelf.spilled)[limit == 0] == sum(
                t.numel() * t.element_size() for t in {id(t): t for t in tensors_in(value)}.values()
            )
            found = kept.take()
            assert type(found) is type(value) and same_bits(value, found)
            tensors_in(found)[0].fill_(7)
            assert same_bits(value, kept.take())
    assert found.again is found.seen[0]  # one tensor stays one


def test_an_object_that_takes_no_places_is_copied() -> None:
    class Strict(UserDict):  # type: ignore[type-arg]
        def __setstate__(self, state: dict[str, Any]) -> None:
            assert all(isinstance(v, torch.Tensor) for v in state["data"].values())
            self.__dict__.update(state)

    value = Strict(a=torch.randn(3))
    with Shelf(0) as shelf:
        assert same_bits(value, shelf.put(value).take())


def test_packed_sequences() -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    with Shelf(0) as shelf:
        assert same_bits(packed, shelf.put(packed).take())


def samples(shelf: Shelf, pairs: list[tuple[Any, Any]], run: Any, size: int = 4) -> Samples:
    return Samples([Sample(shelf.put(x), shelf.put(y)) for x, y in pairs], run, size)


def double(given: tuple[torch.Tensor]) -> torch.Tensor:
    return 2 * given[0]


def test_rows_of_all_calls_where_the_first_axis_is_the_batch() -> None:
    with Shelf(0) as shelf:
        xs = [torch.arange(n, dtype=torch.float32).view(n, 1) + 10 * n for n in (3, 1, 5)]
        found = samples(shelf, [((x,), 2 * x) for x in xs], double)
        assert found.by_rows
        generator, seen = torch.Generator().manual_seed(0), set()
        for _ in range(50):
            (x,), y = found.draw(generator)
            assert x.shape == (4, 1) and torch.equal(y, 2 * x)
            seen.update(x.flatten().tolist())
        assert seen == set(torch.cat(xs).flatten().tolist())


def test_single_rows_are_joined_too() -> None:
    with Shelf(0) as shelf:
        xs = [torch.randn(1, 2) for _ in range(3)]
        assert samples(shelf, [((x,), 2 * x) for x in xs], double).by_rows


@pytest.mark.parametrize(
    ("xs", "run"),
    [
        ([torch.randn(3, 2), torch.randn(3, 4)], double),  # other sizes
        ([torch.randn(4, 2)] * 2, lambda given: given[0].cumsum(0)),  # time first
        ([torch.randn(3, 2)] * 2, lambda given: given[0].view(3, 2)),  # a fixed size
        ([torch.randn(1, 2)], double),  # nothing to tell it by
    ],
)
def test_else_whole_calls(xs: list[torch.Tensor], run: Any) -> None:
    with Shelf(0) as shelf:
        found = samples(shelf, [((x,), run((x,))) for x in xs], run)
        assert not found.by_rows
        (x,), y = found.draw(torch.Generator().manual_seed(0))
        assert any(torch.equal(x, one) for one in xs) and torch.equal(y, run((x,)))


def test_power_is_the_variance() -> None:
    with Shelf(0) as shelf:
        ys = [torch.randn(6, 2) + 3 for _ in range(2)]
        found = samples(shelf, [((y,), y) for y in ys], double)
        assert found.power == pytest.approx(float(torch.cat(ys).var(correction=0)), rel=1e-5)
        assert samples(shelf, [((ys[0],), torch.zeros(2))], double).power == 1.0
        assert samples(shelf, [((ys[0],), torch.ones(2))], double).power == 1.0
