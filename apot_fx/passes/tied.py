"""Tied layers: several that read one Parameter, an embedding and the head behind it, say.

A weight has one spec (contract 4.13). The *head*, the last of them that is no embedding, decides:
the others follow its weight's spec where they are to be quantized themselves, and stay in float
where it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from ..config import QConfig
from ..errors import ConfigError
from ..graph import constant_value
from ..nn import EMBEDDINGS
from .stage import StageModule


@dataclasses.dataclass(frozen=True)
class Member:
    """A layer that shares its weight.

    ``name``: in the model. ``named``: whether the config chose it by name or type. ``reason``: why
    it stays in float, or "".
    """

    name: str
    layer: nn.Module
    config: QConfig | None
    named: bool
    reason: str

    @property
    def is_embedding(self) -> bool:
        return type(self.layer) in EMBEDDINGS


#: Tied layers by the ``id`` of their Parameter.
Groups = Mapping[int, Sequence[Member]]


def settle(members: Sequence[Member]) -> dict[str, tuple[QConfig | None, str]]:
    """What becomes of each tied layer, by name: its QConfig, and why it stays in float.

    Raises ConfigError where the config names two of them and wants different things.
    """
    heads = [member for member in members if not member.is_embedding] or list(members)
    head = heads[-1]
    settled = {head.name: (head.config, head.reason)}
    for member in members:
        if member is head:
            continue
        _check(member, head)
        if member.reason or member.config is None:
            settled[member.name] = (member.config, member.reason)
        elif head.reason or head.config is None:
            why = f"its weight is {head.name}'s too, which stays in float"
            settled[member.name] = (None, why)
        else:
            config = dataclasses.replace(member.config, weight=head.config.weight)
            settled[member.name] = (config, "")
    return settled


def _check(member: Member, head: Member) -> None:
    mine, theirs = (m.config and m.config.weight for m in (member, head))
    if member.named and head.named and mine is not None and mine != theirs:
        wanted = "float" if theirs is None else theirs.describe()
        raise ConfigError(
            f"{member.name} and {head.name} have one weight, but the config wants "
            f"{mine.describe()} of the first and {wanted} of the second; choose the same for "
            "both, or None for the first"
        )


def weight_of(
    stage: StageModule, layer: nn.Module, nodes: Iterable[fx.Node]
) -> tuple[nn.Parameter | None, bool]:
    """The Parameter that a layer's calls multiply with, and whether they transpose it first.

    None where it is computed from Parameters, or there is none.
    """
    turned = False
    for node in nodes:
        source = node.args[3] if len(node.args) > 3 else None
        while isinstance(source, fx.Node) and source.op == "call_method" and source.target == "t":
            source, turned = source.args[0], not turned
        if isinstance(source, fx.Node):
            value = constant_value(stage, source) if source.op == "get_attr" else None
            return (value if isinstance(value, nn.Parameter) else None), turned
    return layer._parameters.get("weight"), turned


def with_others(own: Sequence[Member], everywhere: Sequence[Member]) -> list[Member]:
    """A group's members, in the model's order, as a stage knows its own; then those that only the
    stage knows (functional heads)."""
    mine = {member.name: member for member in own}
    members = [mine.pop(member.name, member) for member in everywhere]
    return members + list(mine.values())
