"""Tracing by recording: what a module asks of ATen in one run, as the graph that torch.export would write.

torch.export imports a compiler, which takes longer than most channel cuts. A recording is used where a second run, on
other numbers, shows that it computes what the module does; where anything unusual comes by, torch.export is asked.

A version of PyTorch may lack one of its private APIs that a recording needs: then this module cannot be imported.
"""
# ruff: noqa: SLF001

from __future__ import annotations

import inspect
import operator
import threading
import types
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, cycle
from typing import Any, NoReturn

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context as compiling_state
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import map_aggregate
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from prunectl.training.torch._compat import tree_flatten

_OpOverload = torch._ops.OpOverload
"""One variant of an operation."""


class UnrecordableError(Exception):
    """Something that a recording would not hold as torch.export does."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """The operations of a module, and how what comes out is packed."""

    module: torch.fx.GraphModule
    out_spec: Any


def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Recording:
    """Run a module, and record its operations; UnrecordableError where torch.export may have more to say.

    What the module itself raises is passed on.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnrecordableError("a script has no forward in Python")
    tape = _Tape(module)
    tape.begin(inputs, _input_names(module, len(inputs)))
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        _module_paths(module, tape),
        compiling_state(),
        torch.backends.cudnn.flags(enabled=False),
        enable_python_dispatcher(),
        _Reads(tape),
        _Factories(tape),
        _Operations(tape),
    ):
        warnings.simplefilter("ignore")
        outputs = module(*inputs)
    if tape.refusal:
        # The module may have caught it, and gone another way.
        raise UnrecordableError(tape.refusal)
    flat, spec = tree_flatten(outputs)
    return Recording(tape.end(flat), spec)


def _input_names(module: torch.nn.Module, count: int) -> list[str]:
    """What `forward` calls its inputs."""
    parameters = [*inspect.signature(module.forward).parameters.values()][:count]
    if len(parameters) < count or any(parameter.kind not in _PLAIN for parameter in parameters):
        raise UnrecordableError("forward takes what has no name of its own")
    return [parameter.name for parameter in parameters]


_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_LITERALS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, types.NoneType)


@dataclass(slots=True)
class _Tape:
    """The graph so far, and which node of it made which tensor."""

    module: torch.nn.Module
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    paths: list[tuple[str, tuple[str, str]]] = field(default_factory=list)
    """The modules that the run is inside, as torch.export notes them."""
    refusal: str = ""
    """The first reason why there is no recording."""
    is_inside: bool = False
    """Whether an operation is on its way, and what is seen are its parts."""
    nodes: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """By tensor, as long as there is one: a run holds no more in memory than it would without the tape."""
    fixed: set[int] = field(default_factory=set)
    """The memory of weights and inputs."""

    def begin(self, inputs: tuple[torch.Tensor, ...], names: Iterable[str]) -> None:
        """Put weights and inputs in front."""
        module = self.module
        weights = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        for name, weight in chain(*weights):
            # Of several names the last is that of the weight, as torch.export has it.
            self._bind(weight, self.graph.create_node("get_attr", name, name=name.replace(".", "_")))
        for name, value in zip(names, inputs, strict=True):
            self._bind(value, self.graph.placeholder(name))
        self.fixed.update(tensor.untyped_storage().data_ptr() for tensor in self.nodes)

    def refuse(self, reason: str) -> NoReturn:
        self.refusal = self.refusal or reason
        raise UnrecordableError(reason)

    def run(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(op, _OpOverload) or op.namespace != "aten" or _has_data_in_shape(op):
            self.refuse(str(op))
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            self.refuse("a mode was switched")
        self._refuse_changes(op, args, kwargs)
        node_args, node_kwargs = map_aggregate((args, dict(kwargs)), self._argument)
        self.is_inside = True
        try:
            result = op(*args, **kwargs)
        finally:
            self.is_inside = False
        if op is torch.ops.aten.detach.default and self._is_made_of_nothing(node_args[0]):
            # PyTorch does so itself behind each factory.
            self._bind(result, node_args[0])
            return result
        node = self._node(op, node_args, node_kwargs, op.overloadpacket.__name__)
        if _is_dense(result):
            self._bind(result, node)
        elif isinstance(result, tuple | list) and all(_is_dense(item) for item in result):
            for number, item in enumerate(result):
                self._bind(item, self._node(operator.getitem, (node, number), {}, "getitem"))
        else:
            self.refuse(f"{op} gives something else than dense tensors")
        return result

    def end(self, outputs: list[Any]) -> torch.fx.GraphModule:
        """The graph, with what came out at its end."""
        self.graph.output(tuple(self._node_of(value) for value in outputs))
        return torch.fx.GraphModule(self.module, self.graph)

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> torch.fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["nn_module_stack"] = dict(self.paths)
        return node

    @staticmethod
    def _is_made_of_nothing(node: torch.fx.Node) -> bool:
        return node.op == "call_function" and not node.all_input_nodes

    def _bind(self, value: torch.Tensor, node: torch.fx.Node) -> None:
        self.nodes[value] = node

    def _node_of(self, value: object) -> torch.fx.Node:
        node = self.nodes.get(value) if isinstance(value, torch.Tensor) else None  # type: ignore[no-untyped-call]
        if not isinstance(node, torch.fx.Node):
            self.refuse("a value was made by no operation")
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if not isinstance(value, _LITERALS):
            self.refuse(f"an argument is a {type(value).__name__}")
        return value

    def _refuse_changes(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Of weights and inputs: the next run would begin with others."""
        arguments = op._schema.arguments
        by_keyword = [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
        for argument, value in (*zip(arguments, args, strict=False), *by_keyword):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.fixed:
                self.refuse(f"{op} changes a weight or an input")


def _is_dense(value: object) -> bool:
    """Whether a value is a tensor whose shape says all of how its numbers lie."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _has_data_in_shape(op: Any) -> bool:
    return (
        torch.Tag.dynamic_output_shape in op.tags
        or torch.Tag.data_dependent_output in op.tags
        or op.overloadpacket.__name__ in _UNTAGGED
    )


_UNTAGGED = frozenset({"_pack_padded_sequence", "_pad_packed_sequence", "_padded_dense_to_jagged_forward"})
"""What reads lengths from the memory of a tensor, and does not say so."""


class _Operations(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode that sees every operation on tensors whole, above autograd and before it is split into others.

    PyTorch lets a few classes of its own into that place; all that is taken from this one is that it is one of them.
    Under `enable_python_dispatcher`, without which nothing is seen there.
    """

    def __init__(self, tape: _Tape) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]
        self._tape = tape

    def __enter__(self) -> Any:
        return TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: object) -> None:
        TorchDispatchMode.__exit__(self, *raised)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch shall import its compiler, to keep it away from here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._tape.run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode that sees operations that make a tensor of nothing, which the other does not."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Write an operation down that is no part of another; of a part, see whether it reads numbers."""
        if self._tape.is_inside:
            if _has_data_in_shape(func):
                self._tape.refuse(str(func))
            return func(*args, **(kwargs or {}))
        return self._tape.run(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    """Refuses what reads numbers past the operations, and would make constants of them."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READS:
            self._tape.refuse(str(func))
        return func(*args, **(kwargs or {}))


_READS = frozenset({"tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "untyped_storage", "storage"})


@contextmanager
def _module_paths(module: torch.nn.Module, tape: _Tape) -> Generator[None]:
    """Keep up which modules the run is inside; one with several names has them in turn."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, inner in module.named_modules(remove_duplicate=False):
        names[id(inner)].append(path)
    turns = {number: cycle(paths) for number, paths in names.items()}

    thread, stack = threading.get_ident(), list[torch.nn.Module]()

    def enter(inner: torch.nn.Module, _: object) -> None:
        # The hooks are those of the whole process.
        if threading.get_ident() == thread:
            path = next(turns[id(inner)]) if id(inner) in turns else ""
            stack.append(inner)
            tape.paths.append((path, (path, type(inner).__qualname__)))

    def leave(inner: torch.nn.Module, _: object, __: object) -> None:
        if threading.get_ident() != thread:
            return
        tape.paths.pop()
        if stack.pop() is not inner:
            tape.refuse(_CAUGHT)

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if stack:
        tape.refuse(_CAUGHT)


_CAUGHT = "what was raised in a module was caught"
"""While it is compiling, PyTorch runs no hook then: paths that follow begin with a module that was left."""
