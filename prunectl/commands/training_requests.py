"""What is typed after `finetune`, as a request."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import typer

from prunectl.commands.requests import layer_ratio
from prunectl.errors import UsageError
from prunectl.pruning.request import Request as Pruning
from prunectl.reporting.words import parse_ratio
from prunectl.training.network import Means, Origin
from prunectl.training.request import Keep, MaskMode, Ramping, Request


def training_of(ctx: typer.Context) -> Request:
    """Return the request that was typed; what is to be imported first is imported."""
    said = ctx.params
    for module in said["imports"] or ():
        _import(module)
    return Request(
        data=said["data"],
        val=said["val"],
        val_split=parse_ratio(said["val_split"]) if said["val_split"] else 0.0,
        epochs=said["epochs"],
        steps=said["steps"],
        batch_size=said["batch_size"],
        means=_means(said),
        origin=Origin(said["build"], said["custom_objects"], is_trusted=said["trust"], seed=said["seed"]),
        pruning=_pruning(said),
        ramping=_ramping(said),
        mask=MaskMode(said["mask"]),
        keep=Keep(said["keep"]),
        rate=said["lr_schedule"],
        warmup=said["warmup"],
        early_stop=said["early_stop"],
        frozen=tuple(said["freeze"] or ()),
        distill=said["distill"],
        is_recalibrated=said["recalibrate"],
        keeps_wrappers=said["keep_wrappers"],
        checkpoint_dir=_path(said["checkpoint_dir"]),
        is_resumed=said["resume"],
        logdir=_path(said["logdir"]),
    )


def _means(said: dict[str, Any]) -> Means:
    return Means(
        loss=said["loss"],
        optimizer=said["optimizer"],
        lr=said["lr"],
        metrics=tuple(said["metric"] or ()),
        clip=said["clip"],
        precision=said["precision"],
        device=said["device"],
        is_compiled=said["compile_"],
        custom_step=said["step"],
        seed=said["seed"],
        teacher_share=said["distill_share"],
        temperature=said["temperature"],
    )


def _pruning(said: dict[str, Any]) -> Pruning:
    return Pruning(
        sparsity=parse_ratio(said["sparsity"]) if said["sparsity"] else None,
        strategy=said["strategy"],
        params=tuple(said["param"] or ()),
        scope=str(said["scope"]),
        pattern=said["pattern"],
        policy=said["policy"],
        only=said["only"],
        exclude=tuple(said["exclude"] or ()),
        layers=tuple(map(layer_ratio, said["layer"] or ())),
        seed=said["seed"],
    )


def _ramping(said: dict[str, Any]) -> Ramping:
    params = tuple(said["schedule_param"] or ())
    if said["power"] is not None:
        params += (f"power={said['power']:g}",)
    return Ramping(
        name=said["schedule"],
        initial=parse_ratio(said["initial_sparsity"]) if said["initial_sparsity"] else 0.0,
        begin=said["begin"],
        end=said["end"],
        frequency=said["frequency"],
        params=params,
    )


def _path(word: Any) -> Path | None:
    # In the context is what was typed: typer makes paths and choices of it on the way to the function.
    return None if word is None else Path(word)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--import {name}: {error}", hint="is its folder in PYTHONPATH?") from error
