"""Trust checks before a framework opens a model: no code from the file runs unless the user allows it.

Every framework is reached through these checks, and imported only afterwards. `formats/trust.py` (Keras and TensorFlow)
and `formats/torch/trust.py` list what each kind of file may refer to.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, PrunectlError, UntrustedError, UsageError, WorkError, abbreviated, first_line
from prunectl.formats import zip_read
from prunectl.formats.base import Family, ModelFile
from prunectl.formats.registry import load
from prunectl.plugins import attribute, find
from prunectl.training.backend import LoadOptions


def custom_objects(origin: LoadOptions) -> dict[str, Any]:
    """Load the user's custom objects, by name."""
    if not origin.custom_objects:
        return {}
    objects = resolve_reference(origin.custom_objects, "--custom-objects", "models:CUSTOM_OBJECTS")
    if not isinstance(objects, Mapping):
        raise UsageError(f"--custom-objects {origin.custom_objects} is not a dictionary")
    return dict(objects)


def resolve_reference(reference: str, option: str, example: str) -> Any:
    """Import the object that `mod:name` or `./file.py:name` refers to."""
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(
            f"{option} {reference} names no function: write module:function", hint=f"write {option} {example}"
        )
    return attribute(where, name)


def resolve_function(reference: str, option: str) -> Any:
    """Import the function that a reference names."""
    function = resolve_reference(reference, option, "my_module:my_function")
    if not callable(function):
        raise UsageError(f"{option} {reference} is of type {type(function).__name__}, not a function")
    return function


def check(model: ModelFile, origin: LoadOptions) -> None:
    """Refuse a file that contains code, or refers to code that is not trusted.

    If the user's own function builds the model, only arrays are read from the file, so it needs no check.
    """
    check_builder(origin.model)
    if origin.is_trusted or origin.model:
        return
    if model.family in {Family.KERAS, Family.SAVED_MODEL}:
        load("trust:check")(model, lambda: custom_objects(origin))
    elif model.family is Family.TORCH_PROGRAM:
        load("torch.trust:check_program")(model.path)
    elif is_script(model):
        load("torch.trust:check_script")(model.path)
    elif model.family is Family.TORCH and model.about.code:
        raise UntrustedError(
            f"{model.path} holds a whole Python module ({model.about.code[0]}): opening it would run code",
            hint=f"if you trust it: --trust {import_option(model, _module_of(model.about.code[0]))}\n"
            "better: save only torch.save(model.state_dict(), ...), and use --builder module:function",
        )


def require_network(model: ModelFile, origin: LoadOptions) -> None:
    """Refuse a file of weights without a builder, before its framework is imported, which would refuse it too."""
    is_torch = model.family in {Family.TORCH, Family.SAFETENSORS} and model.folder is None and not model.about.code
    is_bare = (is_torch and not is_script(model)) or (model.family is Family.KERAS and model.about.keras is None)
    if is_bare and not origin.model:
        raise no_network(model)


def no_network(model: ModelFile) -> UsageError:
    """The error for a file that holds no network."""
    if ((model.folder or model.path.parent) / "adapter_config.json").is_file():
        return UsageError(
            f"{model.folder or model.path} holds an adapter, which runs only in its base model",
            hint="merge them, with merge_and_unload of peft, and name the folder of the merged model",
        )
    return UsageError(
        f"{model.path} holds only weights, not the network that uses them",
        hint="name the function that builds it: --builder package.module:function, or ./file.py:function",
    )


def search_current_folder() -> None:
    """Add the current folder to the end of the import path, as a script there would, for a trusted file."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def import_option(model: ModelFile, module: str) -> str:
    """The `--import` option for a module that a file refers to: by path if it is beside the model or in this folder."""
    name = module.partition(".")[0]
    if not name.isidentifier() or name == "__main__":
        return "--import MODULE"
    paths = (Path(f"{name}.py"), model.path.parent / f"{name}.py")
    file = next((path for path in paths if path.is_file()), None)
    if file is None:
        return f"--import {abbreviated(module)}"
    return f"--import {file}" if file.is_absolute() or file.parent != Path() else f"--import ./{file}"


def _module_of(code: str) -> str:
    """The module of `class net.Net`."""
    return code.rpartition(" ")[2].rpartition(".")[0]


def is_script(model: ModelFile) -> bool:
    """Whether the file is TorchScript: torch.load passes it on to torch.jit.load, which runs its code."""
    if model.format != "torch":
        return False
    names = [f"/{name.casefold()}" for name in zip_read.open_archive(model.path).entries]
    return any(name.endswith("/constants.pkl") for name in names)


def check_checkpoint(model: ModelFile) -> None:
    """Refuse files in which torch.load of PyTorch 2.5 and earlier may run code despite weights_only=True.

    CVE-2025-32434: tar files and TorchScript bypassed the restricted unpickler.
    """
    is_tar = model.format != "torch" and tarfile.is_tarfile(model.path)
    if is_tar or is_script(model):
        kind = "a tar" if is_tar else "TorchScript"
        raise InputError(
            f"{model.path} is {kind}, which PyTorch cannot load with weights_only=True",
            hint="save it again with torch.save(model.state_dict(), ...)",
        )


def find_guarded(kind: str, name: str, builtin: Mapping[str, Any]) -> Any:
    """As `plugins.find`, but names a user's function that raises an exception or returns no PyTorch tensor."""
    function: Any = find(kind, name, builtin)
    if name in builtin or not callable(function):
        return function

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        try:
            value = function(*arguments, **keywords)
        except (PrunectlError, MemoryError):
            raise
        except Exception as error:
            if "OutOfMemory" in type(error).__name__:
                raise
            raise WorkError(f"{name} raised {type(error).__name__}: {first_line(error)}") from error
        if not hasattr(value, "backward"):
            returned = "None" if value is None else f"an object of type {type(value).__name__}"
            raise WorkError(f"{name} returned {returned}, not a tensor", hint="return the loss as a PyTorch tensor")
        return value

    return guarded


_MOST_NAMES = 3


def resolve_builder(reference: str) -> Any:
    """The object that a `--builder` reference names."""
    check_builder(reference)
    return find("model", reference, {})


def check_builder(reference: str) -> None:
    """Refuse a missing Python file, and a reference without a function; no code of the file is run."""
    file, _, name = reference.rpartition(":")
    if file.endswith(".py") and name and not Path(file).is_file():
        raise UsageError(f"--builder {reference}: {file} is not a Python file")
    if reference.endswith(".py") and ":" not in reference:
        names = _public_names(Path(reference))
        listed = ", ".join(names[:_MOST_NAMES]) or "no function or class"
        raise UsageError(
            f"--builder {reference} names no function; the file has {listed}",
            did_you_mean=tuple(f"{reference}:{name}" for name in names[:_MOST_NAMES]),
            hint=f"write --builder {reference}:{names[0] if names else 'function'}",
        )


def call_builder(make: Any, reference: str) -> Any:
    """Call a builder; exceptions in it are the user's errors."""
    if not callable(make):
        raise UsageError(f"--builder {reference} is of type {type(make).__name__}, not a function")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(
            f"--builder {reference} cannot be called without arguments: {error}",
            hint="name a function without arguments that returns the model",
        ) from error
    except ValueError:
        pass  # Python cannot say what some callables take
    try:
        return make()
    except PrunectlError:
        raise
    except Exception as error:
        raise UsageError(
            f"--builder {reference} raised {type(error).__name__}: {first_line(error)}",
            hint="to see where, add --debug",
        ) from error


def _public_names(path: Path) -> list[str]:
    """The public functions and classes of a Python file, which is parsed but not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a Python file: {first_line(error)}") from error
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
