"""The bit stream against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apot_fx
from apot_fx.errors import TensorError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 15), st.data())
def test_pack_is_one_little_endian_number(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    dtype = torch.uint8 if bits <= 8 else torch.int16
    packed = apot_fx.pack(torch.tensor(values, dtype=dtype), bits)
    number = sum(value << (bits * place) for place, value in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes((len(values) * bits + 7) // 8, "little")
    assert apot_fx.unpack(packed, bits, (len(values),)).tolist() == values


def test_logical_order_of_any_layout() -> None:
    index = torch.randint(0, 16, (3, 4, 5), dtype=torch.uint8).permute(2, 0, 1)
    packed = apot_fx.pack(index, 4)
    assert torch.equal(packed, apot_fx.pack(index.contiguous(), 4))
    assert torch.equal(apot_fx.unpack(packed, 4, (5, 3, 4)), index)


def test_refusals() -> None:
    index = torch.tensor([3, 16], dtype=torch.uint8)
    with pytest.raises(TensorError, match="do not fit into 4 bits"):
        apot_fx.pack(index, 4)
    with pytest.raises(TensorError, match="1 to 15"):
        apot_fx.pack(index, 16)
    with pytest.raises(TensorError, match="takes 3 bytes"):
        apot_fx.unpack(index, 4, (5,))
