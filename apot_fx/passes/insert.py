"""Insert: fake-quants on the edges before quantized layers, and the layers' prepared form."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn

from ..fake_quant import FakeQuantize
from ..graph import called_module, module_aliases, set_submodule
from ..nn import PreparedLayer, PreparedOp, prepare_standalone, prepared_type
from .annotate import STANDALONE_CONFIG, plan_of
from .base import Pass
from .functional_layers import computed_operands
from .grammar import is_prepared
from .report import PassReport
from .share import GROUPS, UNSIGNED
from .stage import NodeInfo, StageModule, info, inputs_of, next_id, set_info
from .tree import joined

#: torch's name for what stands behind an activation, kept so that people find it.
ACTIVATION = "activation_post_process_"


@dataclasses.dataclass(frozen=True)
class Insert(Pass):
    """Write ``layer(fake_quant(x), fake_quant module, …)`` for every planned call.

    Where inputs are a tuple, so are the modules: ``op((fq_a(a), fq_b(b)), (fq_a, fq_b), …)``.
    The module is an argument beside its result because one layer may be called at two nodes and
    must know, each time, which grid its input lies on. ``path``: the stage's own in the model.
    """

    path: str = ""

    name = "insert"
    ensures = (is_prepared,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        aliases = module_aliases(stage)
        made: dict[tuple[str, fx.Node], fx.Node] = {}
        for node in list(stage.graph.nodes):
            self._insert_standalone(stage, node, aliases, report)
            plan = plan_of(node)
            if plan is None:
                continue
            layer = called_module(stage, node)
            assert isinstance(layer, nn.Module)
            if plan.weight is not None and not isinstance(layer, PreparedLayer):
                name = str(node.target)
                full = joined(self.path, name)
                weight = computed_operands(stage, node)[:1]
                kind = prepared_type(type(layer))
                assert kind is not None
                prepared = kind.take_over(layer, plan.weight, full, *weight)
                for alias in aliases[id(layer)]:
                    set_submodule(stage, alias, prepared)
                report.change(name, f"weight on {plan.weight.describe()}")
            if plan.activation is not None:
                self._insert_activation(stage, node, made)
                names = (f"{ACTIVATION}{number}" for number in dict.fromkeys(node.meta[GROUPS]))
                report.change(node, f"input through {', '.join(names)}")

    def _insert_standalone(
        self, stage: StageModule, node: fx.Node, aliases: dict[int, list[str]], report: PassReport
    ) -> None:
        config, layer = node.meta.get(STANDALONE_CONFIG), called_module(stage, node)
        if config is None or layer is None or isinstance(layer, PreparedOp):
            return
        prepared = prepare_standalone(layer, config, joined(self.path, str(node.target)))
        for alias in aliases[id(layer)]:
            set_submodule(stage, alias, prepared)
        report.change(node.target, "owns its quantizers")

    @staticmethod
    def _insert_activation(
        stage: StageModule, node: fx.Node, made: dict[tuple[str, fx.Node], fx.Node]
    ) -> None:
        plan = plan_of(node)
        assert plan is not None and plan.activation is not None
        calls, modules = [], []
        for source, number, unsigned in zip(
            inputs_of(node), node.meta[GROUPS], node.meta[UNSIGNED], strict=True
        ):
            name = f"{ACTIVATION}{number}"
            if name not in stage._modules:
                made_now = FakeQuantize.for_activation(plan.activation, False if unsigned else None)
                stage.add_module(name, made_now.to(_device(stage)).train(stage.training))
            call = made.get((name, source))
            if call is None:
                call = made[name, source] = insert_call(stage, name, source)
            calls.append(call)
            with stage.graph.inserting_before(node):
                modules.append(stage.graph.get_attr(name))
        if isinstance(node.args[0], fx.Node):
            node.args = (calls[0], modules[0], *node.args[2:])
        else:
            node.args = (tuple(calls), tuple(modules), *node.args[2:])


def insert_call(stage: StageModule, name: str, source: fx.Node) -> fx.Node:
    """A call of fake-quant ``name`` on ``source``, right after it, with a provenance of its own.

    An argument's stands behind the guards of all arguments.
    """
    graph, place = source.graph, source
    if source.op == "placeholder":
        while place.next.op == "placeholder" or place.next.meta.get("keep"):
            place = place.next
    with graph.inserting_after(place):
        call = graph.call_module(name, (source,))
    set_info(call, NodeInfo(id=next_id(graph), origin=info(source).origin, quantizer=name))
    return call


def _device(stage: StageModule) -> torch.device:
    return next((p.device for p in stage.parameters()), torch.device("cpu"))
