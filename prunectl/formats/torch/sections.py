"""Which entries of a checkpoint only training needs, by the habits of those who write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunectl.formats.state_dict import MODEL_ROOTS, OPTIMIZER_ROOTS, TRAINING_ROOTS
from prunectl.formats.stripping import Part
from prunectl.formats.torch.entries import texts
from prunectl.formats.torch.recipe import Node

_AVERAGES = frozenset(
    {
        *("ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "ema_state", "model_state_dict_ema"),
        *("swa_model", "averaged_model"),
    }
)
_GRADIENTS = frozenset({"grad", "grads", "gradient", "gradients"})
_TRAINING = TRAINING_ROOTS - {"scaler", "grad_scaler"} | {"message_hub", "param_schedulers"}
_FACTS = frozenset(
    {
        *("epoch", "epochs", "global_step", "step", "steps", "iteration", "iterations", "iter", "iters", "updates"),
        *("loss", "losses", "train_loss", "val_loss", "valid_loss", "test_loss", "train_losses", "val_losses"),
        *("acc", "accuracy", "train_acc", "val_acc", "test_acc", "acc1", "metric", "metrics", "history"),
        *("train_metrics", "train_results", "date", "git", "wandb_id", "random_state", "lr", "learning_rate"),
    }
)
_LIGHTNING = "pytorch-lightning_version"
_LIGHTNING_READS = frozenset({"epoch", "global_step"})
"""What Lightning's own loader asks an older checkpoint for."""
_OPTIMIZER_MARKS = ({"state", "param_groups"}, {"state", "hypers"})
_SCALER_MARK = "growth_factor"


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of a checkpoint, and whether it is one that holds more."""

    node: Node
    storages: frozenset[str]
    is_tensor: bool

    @property
    def is_container(self) -> bool:
        """Whether tensors lie in it."""
        return bool(self.storages) and not self.is_tensor

    def keys(self) -> set[str]:
        """Return its own entries' names."""
        return set(texts(self.node))


def dead(sections: Mapping[str, Section]) -> dict[str, Part]:
    """Return the entries that only training needs; none unless a model is left without them."""
    found = {name: part for name, section in sections.items() if (part := _part(name, section, sections)) is not None}
    is_checkpoint = any(section.is_container for name, section in sections.items() if name not in found)
    return found if is_checkpoint else {}


def _part(name: str, section: Section, all_sections: Mapping[str, Section]) -> Part | None:
    low = name.lower()
    if section.node.raw == b"N":
        return None
    if not section.node.is_atom and not section.is_tensor and _is_optimizer(low, section):
        return Part.OPTIMIZER
    if low in _GRADIENTS and section.storages:
        return Part.GRADIENTS
    if _is_copy(name, all_sections):
        return Part.TRAINING
    if _LIGHTNING in all_sections and name in _LIGHTNING_READS:
        return None
    return Part.TRAINING if _is_for_training(low, section) else None


def _is_optimizer(name: str, section: Section) -> bool:
    is_named = name in OPTIMIZER_ROOTS or "optim" in name
    return is_named or any(marks <= section.keys() for marks in _OPTIMIZER_MARKS)


def _is_for_training(name: str, section: Section) -> bool:
    if name in _TRAINING or ("rng" in name.split("_") and not section.is_container):
        return True
    if "scaler" in name:
        # Some keep the scaler of their data under this name, which predictions need.
        return _SCALER_MARK in section.keys()  # noqa: SIM118 (these are not a dictionary's)
    if "sched" in name and not section.node.is_atom:
        return True
    is_fact = name in _FACTS or name.startswith("best_")
    return is_fact and not section.is_container


def _is_copy(name: str, sections: Mapping[str, Section]) -> bool:
    """Whether another entry holds the weights that are used."""
    if not sections[name].is_container:
        return False
    averages = [other for other in sections if other in _AVERAGES and sections[other].is_container]
    if "updates" in sections and "ema" in averages:
        # The layout of YOLO: its loader takes the average if there is one.
        return name == "model"
    models = [other for other in sections if other in MODEL_ROOTS - _AVERAGES and sections[other].is_container]
    return name in averages and bool(models)
