"""torch's transformer layers and containers, written out, and the swap that puts them in place.

torch's encoder classes have a fused path for eval, and containers compare masks' values; neither
can be in a graph. Here every layer calls its submodules, on all positions: padded ones hold what
the layers give there (torch's nested path gives zeros). A mask that happens to be causal is added
like any other; only ``is_causal=True`` drops it for the causal form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import Expanded, ExpandedMultiheadAttention, float_mask


class ExpandedTransformerEncoderLayer(Expanded, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` without its fused path."""

    float_type = nn.TransformerEncoderLayer

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        masks = float_mask(src_mask, src), float_mask(src_key_padding_mask, src)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class ExpandedTransformerDecoderLayer(Expanded, nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``: its own forward can be traced, once it is no leaf."""

    float_type = nn.TransformerDecoderLayer

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's would put relu in the place of an activation that is a module, in every copy.
        nn.Module.__setstate__(self, state)


class ExpandedTransformerEncoder(Expanded, nn.TransformerEncoder):
    """``nn.TransformerEncoder`` on plain tensors, whatever ``enable_nested_tensor`` says.

    So positions that ``src_key_padding_mask`` leaves out are computed like all others, while
    torch's nested path (eval, no gradients) fills them with zeros.
    """

    float_type = nn.TransformerEncoder

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        output, padding = src, float_mask(src_key_padding_mask, src)
        mask = float_mask(mask, src)
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=is_causal is True,
                src_key_padding_mask=padding,
            )
        return output if self.norm is None else self.norm(output)


class ExpandedTransformerDecoder(Expanded, nn.TransformerDecoder):
    """``nn.TransformerDecoder`` that looks at no mask's values."""

    float_type = nn.TransformerDecoder

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        options = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal is True,
            "memory_is_causal": memory_is_causal,
        }
        output = tgt
        for layer in self.layers:
            output = layer(output, memory, **options)
        return output if self.norm is None else self.norm(output)


class ExpandedTransformer(Expanded, nn.Transformer):
    """``nn.Transformer``; its attention, not its forward, refuses sizes that do not fit."""

    float_type = nn.Transformer

    def forward(
        self,
        src: torch.Tensor,
        tgt: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )


_KINDS: tuple[type[Expanded], ...] = (
    ExpandedMultiheadAttention, ExpandedTransformerEncoderLayer, ExpandedTransformerDecoderLayer,
    ExpandedTransformerEncoder, ExpandedTransformerDecoder, ExpandedTransformer,
)  # fmt: skip

#: Which expanded class stands for which torch class; exact types only.
EXPANDED: dict[type[nn.Module], type[Expanded]] = {kind.float_type: kind for kind in _KINDS}


def expand_attention(model: nn.Module) -> list[str]:
    """Give torch's attention and transformer modules in ``model`` their expanded class, in place.

    The objects stay, so whatever shares or names them still does. Subclasses, and modules with a
    method replaced on the instance, are left alone. Returns the names of the changed modules.
    """
    names = []
    for name, module in model.named_modules():
        if type(module) in EXPANDED and not _has_own_methods(module):
            module.__class__ = EXPANDED[type(module)]
            names.append(name)
    return names


def restore_attention(model: nn.Module) -> list[str]:
    """Undo :func:`expand_attention`; returns the names of the changed modules."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Expanded):
            module.__class__ = module.float_type  # type: ignore[assignment]
            names.append(name)
    return names


def _has_own_methods(module: nn.Module) -> bool:
    return any(callable(getattr(type(module), key, None)) for key in module.__dict__)
