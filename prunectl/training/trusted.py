"""May a model be opened by its framework? Its code does not run unless the user says so.

The one door before every framework, asked before it is imported; what each kind of file may name stands in
`formats/trust.py` (Keras and TensorFlow), `formats/torch/exported_trust.py` and `formats/torch/script_trust.py`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from prunectl.errors import InputError, UntrustedError, abbreviated
from prunectl.formats import trust, zips
from prunectl.formats.base import ModelFile
from prunectl.formats.torch import exported_trust, script_trust
from prunectl.training import custom
from prunectl.training.network import Origin

_KERAS = frozenset({"keras", "keras-h5", "saved-model"})
_TORCH = frozenset({"torch", "torch-legacy", "torch-tar"})


def check(model: ModelFile, origin: Origin) -> None:
    """Refuse a file that brings code, or names code that nobody vouched for.

    Where the user's own function builds the model, nothing in the file is looked at but numbers.
    """
    if origin.is_trusted or origin.model:
        return
    if model.format in _KERAS:
        trust.check(model, lambda: custom.objects(origin))
    elif model.format == "torch-export":
        exported_trust.checked(model.path)
    elif is_script(model):
        script_trust.check(model.path)
    elif model.format in _TORCH and model.about.code:
        raise UntrustedError(
            f"{model.path} holds a whole Python module ({model.about.code[0]}): opening it would run code",
            hint=f"if you trust it: --trust {way_to(model, _module_of(model.about.code[0]))}\n"
            "better: torch.save(model.state_dict(), ...) once, then --model module:function",
        )


def way_to(model: ModelFile, module: str) -> str:
    """The option that imports a module which a file names: by its file, where that lies beside the model or here."""
    name = module.partition(".")[0]
    if not name.isidentifier() or name == "__main__":
        return "--import MODULE"
    places = (Path(f"{name}.py"), model.path.parent / f"{name}.py")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return f"--import {abbreviated(module)}"
    return f"--import {found}" if found.is_absolute() or found.parent != Path() else f"--import ./{found}"


def _module_of(code: str) -> str:
    """The module in `class net.Net`."""
    return code.rpartition(" ")[2].rpartition(".")[0]


def is_script(model: ModelFile) -> bool:
    """Whether it is TorchScript: then torch.load gives it to torch.jit.load, which runs what stands there."""
    if model.format != "torch":
        return False
    names = [f"/{name.casefold()}" for name in zips.open_archive(model.path).entries]
    return any(name.endswith("/constants.pkl") for name in names)


def check_checkpoint(model: ModelFile) -> None:
    """Refuse what torch.load, as PyTorch 2.5 and earlier have it, takes for more than weights with weights_only=True.

    CVE-2025-32434: a tar and TorchScript got past the restricted unpickler.
    """
    is_tar = model.format != "torch" and tarfile.is_tarfile(model.path)
    if is_tar or is_script(model):
        kind = "a tar" if is_tar else "TorchScript"
        raise InputError(
            f"{model.path} is {kind}, which PyTorch does not load as weights alone",
            hint="torch.save(model.state_dict(), ...) writes a file that it does",
        )
