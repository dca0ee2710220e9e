"""Every graph of an ONNX model, those inside nodes included, and which names each can see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from prunectl.formats import budgets
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.proto import GraphProto, Model, NodeProto, ProtoReader
from prunectl.formats.protobuf import WireError


@dataclass(frozen=True, slots=True, eq=False)
class GraphScope:
    """A graph, and the graph around it whose values it can use."""

    graph: GraphProto
    prefix: str = ""
    """What names of its tensors begin with, such as `If_0/then_branch/`; nothing in the main graph."""
    parent: GraphScope | None = None
    depth: int = 0
    is_training: bool = False
    defines: str = ""
    """The operator that it defines, when it is a function's."""
    makers: dict[str, NodeProto | None] = field(default_factory=dict)
    """The node that makes each value; None for a tensor of the file."""

    def owner(self, name: str) -> GraphScope | None:
        """Return the graph whose value a name means here."""
        scope: GraphScope | None = self
        while scope is not None and name not in scope.makers:
            scope = scope.parent
        return scope


def read(reader: ProtoReader, model: Model) -> tuple[GraphScope, ...]:
    """Return the main graph first, then those of functions, of training, and inside nodes."""
    waiting = [_scope(messages.graph(reader, model.graph))]
    for span in model.functions:
        domain, name, graph = messages.function(reader, span)
        waiting.append(_scope(graph, prefix=f"{name}/", defines=f"{domain}.{name}"))
    for number, span in enumerate(at for training in model.training for at in messages.training(reader, training)):
        graph = messages.graph(reader, span)
        waiting.append(_scope(graph, prefix=f"training_{number}/", is_training=True))
    for scope in waiting:
        waiting.extend(_inside(reader, scope))
    return tuple(waiting)


def _inside(reader: ProtoReader, scope: GraphScope) -> Iterator[GraphScope]:
    for node in scope.graph.nodes:
        for name, attribute in node.attributes.items():
            for number, span in enumerate(attribute.graphs):
                if scope.depth == budgets.MAX_ONNX_DEPTH:
                    raise WireError(f"its graphs are nested more than {budgets.MAX_ONNX_DEPTH} deep")
                place = name if len(attribute.graphs) == 1 else f"{name}_{number}"
                prefix = f"{scope.prefix}{node.label}/{place}/"
                if len(prefix) > budgets.MAX_ONNX_PREFIX:
                    raise WireError("the names of its nested graphs are too long")
                yield _scope(
                    messages.graph(reader, span), prefix, scope, scope.depth + 1, is_training=scope.is_training
                )


def _scope(
    graph: GraphProto,
    prefix: str = "",
    parent: GraphScope | None = None,
    depth: int = 0,
    *,
    is_training: bool = False,
    defines: str = "",
) -> GraphScope:
    makers: dict[str, NodeProto | None] = {output: node for node in graph.nodes for output in node.outputs}
    makers.update(dict.fromkeys((tensor.name for tensor in graph.initializers), None))
    makers.update(dict.fromkeys((tensor.values.name for tensor in graph.sparse), None))
    return GraphScope(graph, prefix, parent, depth, is_training, defines, makers)
