"""Prune a model file, verify the result and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from prunectl.analysis import sizes
from prunectl.analysis.patterns import NMPattern, structured_sparsity
from prunectl.analysis.sizes import CodecName, compress, get_codec, measure, packed_bytes
from prunectl.analysis.stats import ModelStats, Tick, measure_stats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.errors import UsageError, WorkError, abbreviated
from prunectl.formats.atomic import flush, flush_meanwhile
from prunectl.formats.base import Capability, ModelFile, Tensor
from prunectl.formats.extents import unchanged
from prunectl.formats.registry import open_model, require
from prunectl.formats.state_dict import has_own_norm, may_change_zeros
from prunectl.formats.workers import reuse_worker, workers
from prunectl.pruning import destination as outputs
from prunectl.pruning import engine
from prunectl.pruning import plan as planning
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PruningMethod, TensorCounts, execute, verify
from prunectl.pruning.masks import NonFinitePolicy
from prunectl.pruning.plan import Plan, Selection
from prunectl.pruning.request import PruneRequest, resolve_method

SPARSEST = 0.99
"""The highest sparsity that is tried for a size: beyond it whole layers become zero."""
CLOSE = 0.99
"""A size between this share of the target and the target is accepted."""
_TRIES = 40


def bisect_sparsity(size_at: Callable[[float], int], target: int, codec: str) -> float:
    """Bisect (with interpolation) for a sparsity whose size is at most the target, and close to it."""
    low, high = 0.0, SPARSEST
    dense = size_at(low)
    if dense <= target:
        return low
    floor = size_at(high)
    if floor > target:
        raise WorkError(
            f"a {codec} size of {target} bytes cannot be reached: {SPARSEST:.0%} sparsity gives {floor} bytes",
            hint="biases, norms and excluded layers are not pruned; try --policy all or --layers '*'",
        )
    above, below = dense, floor
    for attempt in range(_TRIES):
        if below >= CLOSE * target or high - low < 1e-9:
            break
        # Linear interpolation converges fast on smooth curves; every third guess bisects, so that others converge too.
        share = 0.5 if attempt % 3 == 2 else (above - CLOSE * target) / (above - below)
        middle = low + (high - low) * min(max(share, 0.02), 0.98)
        size = size_at(middle)
        if size <= target:
            high, below = middle, size
        else:
            low, above = middle, size
    return high


def sparsity_for_compression(path: Path, selection: Selection, total: int, factor: float) -> float:
    """The sparsity for a compression factor: the number of all parameters over that of the kept ones."""
    sizes = {tensor.name: tensor.size for tensor in selection.tensors}
    fixed = sum(round(share * sizes[name]) for name, share in selection.layer_ratios.items())
    free = sum(sizes.values()) - sum(sizes[name] for name in selection.layer_ratios)
    drop = max(total - total / factor - fixed, 0)
    if drop > free:
        most = total / max(total - fixed - free, 1)
        raise UsageError(
            f"a compression of {factor:g} cannot be reached in {path}: pruning all {free + fixed:,} "
            f"prunable weights gives {most:.3g}",
            hint="--policy all also prunes biases, norms and embeddings",
        )
    return drop / free if free else 0.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of a run: its plan, counts, and statistics before and after."""

    request: PruneRequest
    sparsity: float
    plan: Plan
    counts: dict[str, TensorCounts]
    before: ModelStats
    after: ModelStats
    notes: tuple[str, ...] = ()
    """Notes for the user, each a full sentence."""
    lost: Mapping[str, float] = field(default_factory=dict)
    """Share of the norm that each tensor lost, by name; empty if kept weights change too."""

    def record(self) -> Mapping[str, object]:
        """The pruned tensors, as a manifest lists them."""
        cuts = [
            {"name": cut.tensor.name, "shape": list(cut.tensor.shape), "dropped": counts.dropped, "zeros": counts.zeros}
            for cut in self.plan.cuts
            for counts in (self.counts[cut.tensor.name],)
        ]
        return {"sparsity": self.sparsity, "cuts": cuts}


def prune(
    source: Path | ModelFile,
    request: PruneRequest,
    output: Destination | None,
    *,
    has_digests: bool = False,
    method: PruningMethod | None = None,
    meter: ProgressFactory = no_progress,
    allow_empty: bool = False,
) -> Pruned:
    """Prune a model; without an output, into a scratch file that is measured and deleted.

    A run that prunes all weights of a tensor is refused, unless `allow_empty` is set.
    """
    # One child process reads both the input and the output, where their format is read in a child.
    with reuse_worker():
        model = source if isinstance(source, ModelFile) else open_model(source)
        return _prune(model, request, output, meter, has_digests=has_digests, method=method, allow_empty=allow_empty)


def _prune(
    model: ModelFile,
    request: PruneRequest,
    output: Destination | None,
    meter: ProgressFactory,
    *,
    has_digests: bool,
    method: PruningMethod | None,
    allow_empty: bool,
) -> Pruned:
    method = method or resolve_method(request)
    if request.is_packed:
        require(model, Capability.PACK)
    outputs.check(model, output)
    with unchanged(model.states):
        method, sparsity, plan = resolve_plan(model, request, method)
    with (
        outputs.staging_dir(model, output) as (folder, target),
        workers(2) as background,
        ExitStack() as progress,
    ):
        is_small = model.nbytes <= outputs.BIG_BYTES
        bar = progress.enter_context(meter(f"pruning {model.path.name}", _work(model, plan)))
        # The output must be flushed to disk before it is renamed: that is done while it is written and read back.
        is_written = Event()
        early = background.submit(flush_meanwhile, folder, is_written) if output is not None else None
        written, plan, counts = _write(
            model, plan, method, folder, target, is_packed=request.is_packed, tick=bar.advance
        )
        is_written.set()
        flushing = background.submit(flush, folder) if output is not None else None
        _, zeros = dropped_and_zeros(counts)
        before_stats = background.submit(measure_stats, model, model.tensors, has_channels=is_small, zeros=zeros)
        result = open_model(written)
        after = verify(model, result, counts, has_channels=is_small, tick=bar.advance)
        before = before_stats.result()
        check_pattern(result, plan, method)
        if not allow_empty:
            check_left(before, counts)
        for writing in (early, flushing):
            if writing is not None:
                writing.result()
        if after.bytes.raw <= outputs.BIG_BYTES:
            codec = get_codec(CodecName.GZIP, None)
            before = measure(model, codec, known=before if is_small else None)
            after = measure(result, codec, known=after if is_small else None)
        elif has_digests:
            # Before an output in place replaces the input.
            before = replace(before, sha256=sizes.sha256(model))
            after = replace(after, sha256=sizes.sha256(result))
    shown = str(target if output is not None else "the result")
    notes = (
        *outputs.notes_on_folder(model, output),
        *_note_on_floors(_floored(plan, method, before, counts), plan),
        *_notes_on_parametrizations(model, plan),
        *_note_on_scales(model, plan),
    )
    lost = {name: count.lost for name, count in counts.items() if count.lost is not None}
    return Pruned(request, sparsity, plan, counts, before, replace(after, path=shown), notes, lost=lost)


def _floored(
    plan: Plan, method: PruningMethod, before: ModelStats, counts: Mapping[str, TensorCounts]
) -> tuple[str, ...]:
    """Tensors that keep the minimum, though by rank they would keep fewer weights."""
    if method.weight_updater is None:
        return tuple(cut.tensor.name for cut in plan.cuts if cut.drop is not None)
    if method.not_finite is NonFinitePolicy.ZERO:
        return ()
    # The updater computes the masks itself: a tensor is at its minimum if as many weights as allowed were pruned.
    zeros = {row.name: row.zeros or 0 for row in before.layers}
    most = planning.most_dropped(plan, zeros)
    return tuple(name for name, count in most.items() if zeros[name] < count == counts[name].dropped)


def _note_on_floors(floored: Sequence[str], plan: Plan) -> tuple[str, ...]:
    if len(floored) in {0, len(plan.cuts)}:
        return ()
    name = abbreviated(floored[0])
    who = f"{name} keeps" if len(floored) == 1 else f"{len(floored)} tensors, such as {name}, keep"
    return (f"{who} the minimum share of weights, which is more than the ranking over all layers would leave.",)


def _notes_on_parametrizations(model: ModelFile, plan: Plan) -> Iterator[str]:
    names = {tensor.name for tensor in model.tensors}
    effects = (
        (has_own_norm, "normalised by weight_norm: pruning makes the kept weights larger", " without weight_norm"),
        (may_change_zeros, "the input of a parametrization, whose result may have other zeros", ""),
    )
    for has_effect, effect, without in effects:
        affected = [abbreviated(cut.tensor.name) for cut in plan.cuts if has_effect(cut.tensor.name, names)]
        if affected:
            who = f"{affected[0]} is" if len(affected) == 1 else f"{len(affected)} tensors, such as {affected[0]}, are"
            again = f"save it again{without} (torch.nn.utils.parametrize.remove_parametrizations)"
            yield f"{who} {effect}. To prune the weights that the model computes, {again}."


def _scaled(model: ModelFile, tensors: Iterable[Tensor]) -> str:
    """Which float8 weights have a scale of their own, as in DeepSeek and compressed-tensors; empty if none has."""
    names = {tensor.name for tensor in model.tensors}
    scaled = [
        tensor.name
        for tensor in tensors
        # A scale beside wider floats may be a parameter, such as a learnt step size.
        if tensor.dtype.name.startswith("float8") and names & {f"{tensor.name}_scale", f"{tensor.name}_scale_inv"}
    ]
    if not scaled:
        return ""
    name = abbreviated(scaled[0])
    return f"{name} has a scale" if len(scaled) == 1 else f"{len(scaled)} tensors, such as {name}, have scales"


def _check_scales(model: ModelFile, selection: Selection) -> None:
    """Refuse to rank numbers with scales together with others: whole layers would go, such as the output layer."""
    if who := _scaled(model, selection.tensors):
        raise UsageError(
            f"{who} in the file, so that magnitudes of different layers cannot be compared",
            hint="rank the weights of each layer by themselves: --scope layer",
        )


def _note_on_scales(model: ModelFile, plan: Plan) -> tuple[str, ...]:
    who = _scaled(model, (cut.tensor for cut in plan.cuts))
    return (f"{who} in the file, which the ranking ignores.",) if who else ()


def _work(model: ModelFile, plan: Plan) -> int:
    """Bytes of progress: those that are written, and those that are read back."""
    return sum(cut.tensor.nbytes for cut in plan.cuts) + sum(tensor.storage.stored_bytes for tensor in model.tensors)


def _write(
    model: ModelFile,
    plan: Plan,
    method: PruningMethod,
    folder: Path,
    target: Path,
    *,
    is_packed: bool,
    tick: Tick = lambda _: None,
) -> tuple[Path, Plan, dict[str, TensorCounts]]:
    """Write the pruned model into a folder; return the path to open, the executed plan and the counts.

    If a tensor turns out below its minimum, the changed plan is written again: rare, and a check before costs a pass.
    """
    staged = outputs.staged_paths(model, folder, target)
    counts = execute(model, plan, method, staged, tick)
    floored = engine.with_floors(model, plan, method, *dropped_and_zeros(counts))
    if floored is not plan:
        plan = floored
        for path in staged.values():
            path.unlink()
        counts = execute(model, plan, method, staged)
    written = staged.get(model.path, folder / target.name)
    if is_packed:
        outputs.pack(written, folder)
    return written, plan, counts


def dropped_and_zeros(counts: Mapping[str, TensorCounts]) -> tuple[dict[str, int], dict[str, int]]:
    """The pruned weights of each tensor, and its zeros before pruning, if they were counted."""
    zeros = {name: count.zeros_before for name, count in counts.items() if count.zeros_before is not None}
    return {name: count.dropped for name, count in counts.items()}, zeros


def check_left(before: ModelStats, counts: Mapping[str, TensorCounts]) -> None:
    """Refuse a result with a tensor of only zeros: the layers after it no longer depend on the input."""
    empty = [
        row.name
        for row in before.layers
        if row.name in counts and counts[row.name].zeros == row.params and (row.zeros or 0) < row.params
    ]
    if empty:
        more = f" and of {len(empty) - 1} more tensors" if len(empty) > 1 else ""
        raise WorkError(
            f"{before.path}: nothing would be left of {abbreviated(empty[0])}{more}; nothing was written",
            hint="prune less, use --scope layer or --exclude NAME, or add --allow-empty if that is meant",
        )


def check_pattern(written: ModelFile, plan: Plan, method: PruningMethod) -> None:
    """Check that the written file conforms to the N:M pattern."""
    if not isinstance(method.pattern, NMPattern):
        return
    names = {cut.tensor.name for cut in plan.cuts}
    for tensor in written.tensors:
        if tensor.name in names and tensor.is_prunable and tensor.out_axis is not None:
            share = structured_sparsity(written, tensor, tensor.out_axis, method.pattern).conforming
            if share is not None and share < 1:
                raise WorkError(
                    f"{tensor.name} does not follow the requested pattern in the output; nothing was written"
                )


def resolve_plan(model: ModelFile, request: PruneRequest, method: PruningMethod) -> tuple[PruningMethod, float, Plan]:
    """Resolve a request for a model: the method with model-wide scores, the sparsity, and the plan."""
    selection = planning.select_tensors(model, method.criteria)
    is_joint = method.criteria.scope is planning.Scope.GLOBAL and len(selection.tensors) > 1
    if is_joint and not method.strategy.is_unitless:
        _check_scales(model, selection)
    method, selection = engine.with_model_scores(model, selection, method)
    sparsity = _resolve_sparsity(model, request, selection, method)
    return method, sparsity, planning.make_plan(selection, method.criteria, sparsity)


def _resolve_sparsity(model: ModelFile, request: PruneRequest, selection: Selection, method: PruningMethod) -> float:
    """The requested sparsity, or the one that gives the requested compression or size."""
    if isinstance(method.pattern, NMPattern):
        return method.pattern.zeros / method.pattern.group
    if request.compression is not None:
        total = measure_stats(model, model.tensors, has_zeros=False).params.total
        return sparsity_for_compression(model.path, selection, total, request.compression)
    target, codec = request.target_gzip, "gzip"
    if target is None:
        target, codec = request.target_packed, "packed"
    if target is None:
        return request.sparsity or 0.0
    if codec == "packed":
        require(model, Capability.PACK)

    def size_at(sparsity: float) -> int:
        with outputs.staging_dir(model, None) as (folder, target):
            plan = planning.make_plan(selection, method.criteria, sparsity)
            written = open_model(_write(model, plan, method, folder, target, is_packed=False)[0])
            if codec == "packed":
                return packed_bytes(written, lambda _: None)
            return compress(sizes.iter_model_bytes(written), get_codec(CodecName.GZIP, None)).nbytes

    return bisect_sparsity(size_at, target, codec)
