"""Indices as a little-endian bit stream: index i takes bits ``i·bits`` to ``(i+1)·bits − 1``.

Eight indices fill ``bits`` whole bytes, so the work is a few vectorised operations per byte of
such a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

#: Blocks of eight indices that are worked on at a time: temporaries take 4 bytes an index.
_BLOCKS = 2**16


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """``(index, byte, shift)`` of a block: where index and byte share bits.

    The byte gets ``index << shift``, or ``index >> −shift`` where the shift is negative.
    """
    return [
        (index, byte, index * bits - 8 * byte)
        for index in range(8)
        for byte in range(index * bits // 8, ((index + 1) * bits - 1) // 8 + 1)
    ]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` indices take."""
    return (count * bits + 7) // 8


def pack(index: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack indices, in their logical order, into ``ceil(numel · bits / 8)`` bytes (uint8)."""
    flat = index.reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    out = torch.empty(len(blocks), bits, dtype=torch.uint8, device=index.device)
    for part, place in zip(blocks.split(_BLOCKS), out.split(_BLOCKS), strict=True):
        _pack_blocks(part, bits, place)
    return _first(out, packed_size(flat.numel(), bits))


def _pack_blocks(blocks: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    columns = [blocks[:, place].to(torch.int32) for place in range(8)]
    for byte in range(bits):
        parts = [
            columns[i] << shift if shift >= 0 else columns[i] >> -shift
            for i, at, shift in _overlaps(bits)
            if at == byte
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        out[:, byte] = (total & 255).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, shape: list[int]) -> torch.Tensor:
    """The indices that :func:`pack` packed; uint8 up to 8 bits, else int16."""
    count = 1
    for size in shape:
        count *= size
    dtype = torch.uint8 if bits <= 8 else torch.int16
    blocks = functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    out = torch.empty(len(blocks), 8, dtype=dtype, device=packed.device)
    for part, place in zip(blocks.split(_BLOCKS), out.split(_BLOCKS), strict=True):
        _unpack_blocks(part, bits, place)
    return _first(out, count).reshape(shape)


def _unpack_blocks(blocks: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    columns = [blocks[:, byte].to(torch.int32) for byte in range(bits)]
    for index in range(8):
        parts = [
            columns[byte] >> shift if shift >= 0 else columns[byte] << -shift
            for i, byte, shift in _overlaps(bits)
            if i == index
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        out[:, index] = (total & (2**bits - 1)).to(dtype=out.dtype)


def _first(out: torch.Tensor, count: int) -> torch.Tensor:
    """The first values of a fresh tensor, in memory of just their size."""
    flat = out.reshape(-1)
    return flat if flat.numel() == count else flat[:count].clone()
