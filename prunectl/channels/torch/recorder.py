"""Tracing by recording: the ATen operations of one run of a module, as the torch.fx graph that torch.export would make.

torch.export imports a compiler, which takes longer than most channel cuts. A recording is used if a second run, on
other inputs, shows that it computes what the module computes; for anything unusual, torch.export is used instead.

A version of PyTorch may lack one of the private APIs that a recording needs: then this module cannot be imported.
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
"""An overload of an ATen operation."""


class UnrecordableError(Exception):
    """The error for a module that does something that a recording would not represent as torch.export does."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """The graph of a module, and the pytree structure of its outputs."""

    module: torch.fx.GraphModule
    out_spec: Any


def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Recording:
    """Run a module, and record its operations; UnrecordableError if torch.export may give another graph.

    Exceptions of the module itself are passed on.
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
        # The module may have caught the UnrecordableError, and taken another path.
        raise UnrecordableError(tape.refusal)
    flat, spec = tree_flatten(outputs)
    return Recording(tape.end(flat), spec)


def _input_names(module: torch.nn.Module, count: int) -> list[str]:
    """The names of the parameters of `forward`."""
    parameters = [*inspect.signature(module.forward).parameters.values()][:count]
    if len(parameters) < count or any(parameter.kind not in _PLAIN for parameter in parameters):
        raise UnrecordableError("forward takes arguments without names")
    return [parameter.name for parameter in parameters]


_PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_LITERALS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, types.NoneType)


@dataclass(slots=True)
class _Tape:
    """The graph recorded so far, and the node that made each tensor."""

    module: torch.nn.Module
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    paths: list[tuple[str, tuple[str, str]]] = field(default_factory=list)
    """The stack of modules that are running, in the format of `nn_module_stack` of torch.export."""
    refusal: str = ""
    """The first reason why there is no recording."""
    is_inside: bool = False
    """Whether a recorded operation is running: the operations that it consists of are not recorded."""
    nodes: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """The node that made a tensor; with weak keys, so that the tape keeps no tensor in memory."""
    fixed: set[int] = field(default_factory=set)
    """The addresses of the storages of weights and inputs."""

    def begin(self, inputs: tuple[torch.Tensor, ...], names: Iterable[str]) -> None:
        """Begin the graph with weights and inputs."""
        module = self.module
        weights = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        for name, weight in chain(*weights):
            # A weight with several names gets the last, as in torch.export.
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
            # PyTorch itself detaches the result of each factory function: not an operation of the module.
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
        """The complete graph, with the outputs."""
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
        """Refuse in-place changes of weights and inputs, after which the next run would start with other values."""
        arguments = op._schema.arguments
        by_keyword = [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
        for argument, value in (*zip(arguments, args, strict=False), *by_keyword):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.fixed:
                self.refuse(f"{op} changes a weight or an input")


def _is_dense(value: object) -> bool:
    """Whether a value is a dense tensor, neither sparse nor nested."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _has_data_in_shape(op: Any) -> bool:
    return (
        torch.Tag.dynamic_output_shape in op.tags
        or torch.Tag.data_dependent_output in op.tags
        or op.overloadpacket.__name__ in _UNTAGGED
    )


_UNTAGGED = frozenset({"_pack_padded_sequence", "_pad_packed_sequence", "_padded_dense_to_jagged_forward"})
"""Operations whose output shape depends on the values of a tensor, though they have no tag for it."""


class _Operations(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode that records operations on tensors before autograd, and before they are decomposed into others.

    PyTorch accepts only a few classes of its own as PreDispatch modes: that is the only reason for this base class.
    The mode works only under `enable_python_dispatcher`.
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
        """False, as PyTorch would otherwise import its compiler only to disable it here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._tape.run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode that records factory functions, which have no tensor inputs and do not reach `_Operations`."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record an operation, unless it is a part of a recorded one; refuse parts whose shape depends on values."""
        if self._tape.is_inside:
            if _has_data_in_shape(func):
                self._tape.refuse(str(func))
            return func(*args, **(kwargs or {}))
        return self._tape.run(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    """Refuses functions that read values outside of operations, which would become constants of the graph."""

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
    """Keep `tape.paths` up to date while modules run; a module with several names gets them in turn."""
    names: dict[int, list[str]] = defaultdict(list)
    for path, inner in module.named_modules(remove_duplicate=False):
        names[id(inner)].append(path)
    turns = {number: cycle(paths) for number, paths in names.items()}

    thread, stack = threading.get_ident(), list[torch.nn.Module]()

    def enter(inner: torch.nn.Module, _: object) -> None:
        # Global hooks also run in other threads of the process.
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


_CAUGHT = "an exception of a module was caught"
"""In its compiling state, PyTorch then skips the forward hook: `tape.paths` keeps a module that has ended."""
