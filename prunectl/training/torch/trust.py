"""May PyTorch open this file? Its code does not run unless the user says so; asked before PyTorch is imported."""

from __future__ import annotations

import tarfile

from prunectl.errors import InputError, UntrustedError
from prunectl.formats import zips
from prunectl.formats.base import ModelFile
from prunectl.formats.torch import exported_trust, script_trust
from prunectl.training.network import Origin

FORMATS = frozenset({"torch", "torch-legacy", "torch-tar", "torch-export"})


def check(model: ModelFile, origin: Origin) -> None:
    """Refuse a file that would run code in PyTorch."""
    if origin.is_trusted or model.format not in FORMATS:
        return
    if origin.model:
        # The user's own function builds it: nothing in the file is looked at but numbers.
        return
    if model.format == "torch-export":
        exported_trust.checked(model.path)
    elif is_script(model):
        script_trust.check(model.path)
    elif model.about.code:
        raise UntrustedError(
            f"{model.path} holds a whole Python module ({model.about.code[0]}): opening it would run code",
            hint="if you trust it: --trust --import MODULE\n"
            "better: torch.save(model.state_dict(), ...) once, then --model module:function",
        )


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
