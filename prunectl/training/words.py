"""From the words of the command line, or the same as arguments in Python, to a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.pruning.request import Request as Pruning
from prunectl.training.asked import asked
from prunectl.training.network import Means, Origin
from prunectl.training.request import Keep, MaskMode, Ramping, Request

DEFAULTS: Mapping[str, Any] = {
    "data": "",
    "val": "",
    "val_split": 0.0,
    "epochs": None,
    "steps": None,
    "batch_size": 32,
    "lr": None,
    "lr_schedule": "constant",
    "warmup": "0",
    "optimizer": "",
    "loss": "",
    "metric": (),
    "clip": None,
    "freeze": (),
    "distill": "",
    "distill_model": "",
    "distill_share": 0.5,
    "temperature": 2.0,
    "early_stop": None,
    "keep": "best",
    "recalibrate": False,
    "step": "",
    "precision": "fp32",
    "device": "auto",
    "compile": False,
    "shard": False,
    "workers": 1,
    "seed": 0,
    "sparsity": None,
    "schedule": "",
    "schedule_param": (),
    "initial_sparsity": 0.0,
    "begin": "0",
    "end": "",
    "frequency": None,
    "power": None,
    "strategy": "magnitude",
    "param": (),
    "scope": "layer",
    "pattern": "",
    "policy": "default",
    "only": "",
    "exclude": (),
    "layer": (),
    "mask": "keep",
    "keep_wrappers": False,
    "checkpoint_dir": None,
    "resume": False,
    "logdir": None,
    "model": "",
    "custom_objects": "",
    "trust": False,
}


def request_of(words: Mapping[str, Any]) -> Request:
    """Return the request; what is not said has its default."""
    if unknown := sorted(words.keys() - DEFAULTS.keys()):
        raise UsageError(
            f"finetune has no choice {unknown[0]}", did_you_mean=tuple(get_close_matches(unknown[0], DEFAULTS))
        )
    said = {**DEFAULTS, **words}
    if not said["data"]:
        raise UsageError("what is there to learn from? say --data", hint="such as --data train.npz")
    return Request(
        data=said["data"],
        val=said["val"],
        val_split=said["val_split"],
        epochs=said["epochs"],
        steps=said["steps"],
        batch_size=said["batch_size"],
        means=_means(said),
        origin=Origin(said["model"], said["custom_objects"], is_trusted=said["trust"], seed=said["seed"]),
        pruning=_pruning(said),
        ramping=_ramping(said),
        mask=MaskMode(said["mask"]),
        keep=Keep(said["keep"]),
        rate=said["lr_schedule"],
        warmup=str(said["warmup"]),
        early_stop=said["early_stop"],
        frozen=tuple(said["freeze"]),
        distill=str(said["distill"]),
        distill_model=said["distill_model"],
        is_recalibrated=said["recalibrate"],
        keeps_wrappers=said["keep_wrappers"],
        checkpoint_dir=_path(said["checkpoint_dir"]),
        workers=said["workers"],
        is_resumed=said["resume"],
        logdir=_path(said["logdir"]),
    )


def _means(said: Mapping[str, Any]) -> Means:
    return Means(
        loss=said["loss"],
        optimizer=said["optimizer"],
        lr=said["lr"],
        **asked(said["metric"]),
        clip=said["clip"],
        precision=said["precision"],
        device=said["device"],
        is_compiled=said["compile"],
        is_sharded=said["shard"],
        custom_step=said["step"],
        seed=said["seed"],
        teacher_share=said["distill_share"],
        temperature=said["temperature"],
    )


def _pruning(said: Mapping[str, Any]) -> Pruning:
    layers: Iterable[tuple[str, float]] = said["layer"]
    return Pruning(
        sparsity=said["sparsity"],
        strategy=said["strategy"],
        params=tuple(said["param"]),
        scope=str(said["scope"]),
        pattern=said["pattern"],
        policy=said["policy"],
        only=said["only"],
        exclude=tuple(said["exclude"]),
        layers=tuple((selector, ratio) for selector, ratio in layers),
        seed=said["seed"],
    )


def _ramping(said: Mapping[str, Any]) -> Ramping:
    params = tuple(said["schedule_param"])
    if said["power"] is not None:
        params += (f"power={said['power']:g}",)
    return Ramping(
        name=said["schedule"],
        initial=said["initial_sparsity"],
        begin=str(said["begin"]),
        end=str(said["end"]),
        frequency=said["frequency"],
        params=params,
    )


def _path(word: Any) -> Path | None:
    return None if word is None else Path(word)
