"""Smaller weights in a file like the one they come from, and beside it the class that takes them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunectl.channels.torch import safetensors
from prunectl.channels.torch.checkpoint import Change, home_of, leave_out, smaller
from prunectl.channels.torch.code import source
from prunectl.channels.torch.code.source import MARK
from prunectl.channels.torch.code.text import literal
from prunectl.channels.torch.naming import code_beside
from prunectl.channels.torch.opening import Opened
from prunectl.channels.torch.run import Network
from prunectl.errors import InputError, UntrustedError, UsageError, first_line
from prunectl.formats.base import ModelFile
from prunectl.training import trusted


def beside(target: Path) -> Path:
    """Return where the class goes whose weights go to a target; never where somebody's own code is."""
    code = code_beside(target)
    if code.is_file() and MARK not in code.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        raise UsageError(
            f"{code} exists, and the class for the weights would take its place", hint="choose another --output"
        )
    return code


def write_weights(
    model: ModelFile, found: Opened, network: Network, change: Change, folder: Path, *, target: Path
) -> Path:
    """Write weights and class into a scratch folder, and return the path of the weights."""
    code, path = beside(target), folder / target.name
    if found.holds_module:
        written = source.write(found, network, class_of(found), _loading(target.name))
        torch.save({name: value.contiguous() for name, value in written.state.items()}, path)
    elif model.format == "safetensors":
        first, of = next(iter(found.names.items()))
        prefix = of.removesuffix(first)
        written = source.write(found, network, class_of(found), _loading(target.name, "", prefix))
        extras = {prefix + name: value for name, value in written.extras.items()}
        safetensors.write(model, change, extras, path)
    else:
        root = load(model, found)
        leave_out(root, change.left_out)
        root = smaller(root, change, str(model.path))
        first, of = next(iter(found.names.items()))
        home, key = home_of(root, of)
        prefix = key.removesuffix(first)
        keys = "".join(f"[{literal(word)}]" for word in of.removesuffix(key).split(".") if word)
        written = source.write(found, network, class_of(found), _loading(target.name, keys, prefix))
        home.update({prefix + name: value for name, value in written.extras.items()})
        torch.save(root, path)
    (folder / code.name).write_text(written.text, encoding="utf-8")
    return path


def class_of(found: Opened) -> str:
    """Return the name of the class that is written: that of the module, unless torch has one of this name."""
    kind = type(found.original)
    name = str(getattr(found.original, "original_name", kind.__name__))
    is_own = not kind.__module__.startswith("torch.") or isinstance(found.original, torch.jit.ScriptModule)
    return name if is_own and name.isidentifier() and not hasattr(torch.nn, name) and name != "F" else "Net"


def load(model: ModelFile, found: Opened) -> Any:
    """Return what is in a checkpoint."""
    if not found.is_trusted:
        trusted.check_checkpoint(model)
    try:
        return torch.load(model.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found.is_trusted:
            return torch.load(model.path, map_location="cpu", weights_only=False)
        found_code = f": {model.about.code[0]}" if model.about.code else ""
        raise UntrustedError(
            f"{model.path} holds more than numbers and words{found_code}",
            hint=f"if you trust it: --trust; or leave it out first: prunectl strip {model.path} -o weights.pt",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{model.path} cannot be loaded by this PyTorch: {first_line(error)}") from error


def parameters(found: Opened) -> Mapping[str, str]:
    """Return the tensors of the file by the names of the parameters, in the order that an optimizer gets them in."""
    names = [] if found.original is None else [name for name, _ in found.original.named_parameters()]
    return {name: found.names[name] for name in names if name in found.names}


def _loading(name: str, keys: str = "", prefix: str = "") -> tuple[str, ...]:
    """Return how the weights of a file get into the class: by other names than the file's where these are longer."""
    # Names are quoted as literals: a file may call its tensors whatever it likes.
    state = f"torch.load({literal(name)}, weights_only=True){keys}"
    if name.endswith(".safetensors"):
        state = f"safetensors.torch.load_file({literal(name)})"
    if not prefix:
        return (f"model.load_state_dict({state})",)
    renamed = f"{{name.removeprefix({literal(prefix)}): value for name, value in state.items()}}"
    return (f"state = {state}", f"model.load_state_dict({renamed})")
