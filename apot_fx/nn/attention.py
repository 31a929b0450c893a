"""Multi-head attention written out, so that its projections and products show in a graph.

torch's module is a leaf for ``torch.fx``, decides by ranks and sizes, and in eval may take a fused
path that calls no submodule. The class here computes what torch's does without that path, from
operations that can be traced without example inputs: nothing is decided by values or sizes. What
needs a dtype or a rank stands in functions that are one node each (``attention_bias``,
``padding_bias``, ``additive_mask``, ``batch_of``); they read masks and shapes, never activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..errors import TensorError


class Expanded(nn.Module):
    """Marks torch's modules whose forward is written out: no leaf of a trace.

    They keep parameters, keys, hooks and mode; only the class is another.
    """

    float_type: ClassVar[type[nn.Module]]


def batch_of(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """The batch size of shapes (time, [batch,] features); 1 without a batch axis.

    Raises TensorError where they are no query, key and value of one attention.
    """
    ranks = {len(query), len(key), len(value)}
    if ranks not in ({2}, {3}) or key[:-1] != value[:-1] or query[1:-1] != key[1:-1]:
        raise TensorError(
            f"attention wants a query (time, [batch,] features), and key and value of one time "
            f"and the query's batch; got, time first, {tuple(query)}, {tuple(key)}, {tuple(value)}"
        )
    return query[1] if len(query) == 3 else 1


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to scores: −inf where a bool mask is True; floats stay.

    Raises TensorError for other dtypes.
    """
    if mask.is_floating_point():
        return mask
    if mask.dtype is not torch.bool:
        raise TensorError(f"an attention mask is bool or floating point, not {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def attention_bias(
    mask: torch.Tensor, query: torch.Size, key: torch.Size, heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """A mask (L, S) or (batch · heads, L, S) as float (batch · heads, L, S).

    Raises TensorError for another shape; ``query`` and ``key`` are shapes, time first.
    """
    sizes = (query[0], key[0])
    whole = ((query[1] if len(query) == 3 else 1) * heads, *sizes)
    if tuple(mask.shape) not in (sizes, whole):
        raise TensorError(f"attn_mask has shape {tuple(mask.shape)}, not {sizes} or {whole}")
    return additive_mask(mask, dtype).expand(whole)


def padding_bias(
    mask: torch.Tensor, key: torch.Size, heads: int, dtype: torch.dtype
) -> torch.Tensor:
    """A key padding mask ([batch,] S) as float (batch · heads, 1, S).

    Raises TensorError for another shape; ``key`` is a shape, time first.
    """
    wanted = (*key[1:-1], key[0])
    if tuple(mask.shape) != wanted:
        raise TensorError(f"key_padding_mask has shape {tuple(mask.shape)}, not {wanted}")
    rows = additive_mask(mask, dtype).reshape(-1, 1, 1, key[0])
    return rows.expand(-1, heads, -1, -1).flatten(0, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    training: bool,
) -> torch.Tensor:
    """torch's scaled dot product attention with a dropout that follows a training flag."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p if training else 0.0, is_causal
    )


for _name in ("batch_of", "additive_mask", "attention_bias", "padding_bias", "attend"):
    fx.wrap(_name)


def _once(function: Callable[[torch.Tensor], Any], *tensors: torch.Tensor) -> tuple[Any, ...]:
    """A function of each tensor, called once per object: what was one tensor still is."""
    results = {id(tensor): tensor for tensor in tensors}
    results = {key: function(tensor) for key, tensor in results.items()}
    return tuple(results[id(tensor)] for tensor in tensors)


def _is_unbatched(query: Any) -> bool:
    """Whether a query is known to have no batch axis: torch then shares no product.

    Only the rounding hangs on that, so a trace without values may take the other form, and one with
    values needs no guard.
    """
    known = getattr(query, "value", None) if isinstance(query, fx.Proxy) else query
    return isinstance(known, torch.Tensor) and known.dim() == 2


def float_mask(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """An optional mask in its additive form, of ``like``'s dtype where it was bool."""
    return None if mask is None else additive_mask(mask, like.dtype)


class ExpandedMultiheadAttention(Expanded, nn.MultiheadAttention):
    """``nn.MultiheadAttention``, written out; the same bits as torch's without its fast path.

    With ``need_weights=False`` the core is one call: ``scaled_dot_product_attention``, or
    :func:`attend` where there is a dropout. Bad shapes raise TensorError, not torch's errors.

    Calls without batch axis: a graph traced without values shares products that torch computes
    one by one, and gradients are summed in another order, so last bits may differ there.
    """

    float_type = nn.MultiheadAttention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if is_causal and attn_mask is None:
            raise TensorError("is_causal says what attn_mask is like; pass attn_mask too")
        causal = is_causal and key_padding_mask is None and not need_weights
        query, key, value = self._time_first(query, key, value)
        shape, keys, values = _once(lambda x: x.shape, query, key, value)
        batch = batch_of(shape, keys, values)
        q, k, v = self._heads(query, key, value, batch)
        mask = None if causal else attn_mask
        bias = self._bias(mask, key_padding_mask, shape, keys, q)
        if need_weights:
            mixed, weights = self._weigh(q, k, v, bias)
            weights = weights.unflatten(0, (batch, self.num_heads))
            if average_attn_weights:
                weights = weights.mean(dim=1)
            weights = weights.flatten(0, 3 - query.dim())  # no batch axis where query has none
        else:
            mixed, weights = self._fused(q, k, v, bias, causal, batch), None
        # As a functional call: torch runs no forward, thus no hook, of the child either.
        out = functional.linear(mixed.reshape(shape), self.out_proj.weight, self.out_proj.bias)
        return (out.transpose(0, -2) if self.batch_first else out), weights

    def _time_first(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each as (time, [batch,] features)."""
        if not self.batch_first:
            return tensors
        return _once(lambda x: x.transpose(0, -2), *tensors)

    def _heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, ...]:
        """Projected query, key and value, each (batch · heads, time, features of a head)."""
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).flatten(1, -2)
            for projected in self._projected(query, key, value)
        )
        if self.bias_k is not None or self.bias_v is not None:
            k, v = self._with_row(k, self.bias_k, batch), self._with_row(v, self.bias_v, batch)
        q, k, v = (projected.transpose(0, 1) for projected in (q, k, v))
        if self.add_zero_attn:
            k, v = (functional.pad(projected, (0, 0, 0, 1)) for projected in (k, v))
        return q, k, v

    def _with_row(self, projected: torch.Tensor, row: Any, batch: int) -> torch.Tensor:
        rows = row.view(1, self.num_heads, -1).repeat(1, batch, 1)
        return torch.cat([projected, rows])

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """As many products as torch makes: bits depend on it."""
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return tuple(
                functional.linear(x, weight, self._part(self.in_proj_bias, n, n + 1))
                for n, (x, weight) in enumerate(zip((query, key, value), weights, strict=True))
            )
        if key is not value or _is_unbatched(query):
            inputs = enumerate((query, key, value))
            return tuple(self._packed(x, n, n + 1)[0] for n, x in inputs)
        if query is key:
            return self._packed(query, 0, 3)
        return (*self._packed(query, 0, 1), *self._packed(key, 1, 3))

    def _packed(self, x: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, ...]:
        """Products of ``x`` with some of the three packed weights."""
        weight = self._part(self.in_proj_weight, first, end)
        assert weight is not None
        product = functional.linear(x, weight, self._part(self.in_proj_bias, first, end))
        count = end - first
        if count == 1:
            return (product,)
        parts = product.unflatten(-1, (count, -1)).movedim(-2, 0).contiguous()
        return tuple(parts[n] for n in range(count))

    def _part(self, packed: torch.Tensor | None, first: int, end: int) -> torch.Tensor | None:
        if packed is None or (first, end) == (0, 3):
            return packed
        return packed[first * self.embed_dim : end * self.embed_dim]

    def _bias(
        self,
        attn_mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        query: torch.Size,
        key: torch.Size,
        q: torch.Tensor,
    ) -> torch.Tensor | None:
        """What is added to the scores, (batch · heads, L or 1, S); added keys are never masked."""
        found = []
        if attn_mask is not None:
            heads = self.num_heads
            found.append(attention_bias(attn_mask, query, key, heads, q.dtype))
        if padding is not None:
            found.append(padding_bias(padding, key, self.num_heads, q.dtype))
        if not found:
            return None
        bias = found[0] if len(found) == 1 else found[0] + found[1]
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        return functional.pad(bias, (0, added)) if added else bias

    def _weigh(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed values (L, batch · heads, features of a head), and the weights."""
        scaled, keys = q * math.sqrt(1.0 / float(self.head_dim)), k.transpose(-2, -1)
        # One call for product and bias: two would round, and take memory, once more.
        scores = torch.bmm(scaled, keys) if bias is None else torch.baddbmm(bias, scaled, keys)
        weights = functional.softmax(scores, dim=-1)
        if self.dropout > 0.0:
            weights = functional.dropout(weights, p=self.dropout, training=self.training)
        return torch.bmm(weights, v).transpose(0, 1), weights

    def _fused(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        is_causal: bool,
        batch: int,
    ) -> torch.Tensor:
        """The mixed values (L, batch, heads, features of a head)."""
        sizes = (batch, self.num_heads)
        q, k, v = (x.unflatten(0, sizes) for x in (q, k, v))
        mask = None if bias is None else bias.unflatten(0, sizes)
        if self.dropout > 0.0:
            mixed = attend(q, k, v, mask, self.dropout, is_causal, training=self.training)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal)
        return mixed.permute(2, 0, 1, 3)
