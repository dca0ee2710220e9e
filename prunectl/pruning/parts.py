"""Prune a model folder in parts, on any number of machines: each part writes its shards, the join all other files.

The ledger records for each shard its input, the histograms of its scores (for the global scope) and its output, so that
no shard is pruned twice. The join writes the index last: before that the output cannot be opened as a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl import __version__
from prunectl.analysis.patterns import BlockPattern
from prunectl.analysis.sizes import CodecName, get_codec, measure, sha256, sha256_of
from prunectl.analysis.stats import ModelStats, SizeStats, measure_stats, totals
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.errors import InputError, UsageError, WorkError, abbreviated
from prunectl.formats import registry, scratch
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.extents import REMOTE, file_bytes, file_states, unchanged
from prunectl.formats.patch import patch_files
from prunectl.formats.remote import check_unchanged, downloaded
from prunectl.formats.safetensors import shard_of
from prunectl.formats.workers import reuse_worker, workers
from prunectl.plugins import check_untrusted
from prunectl.pruning import destination as outputs
from prunectl.pruning import engine, masks
from prunectl.pruning import plan as planning
from prunectl.pruning.destination import Destination
from prunectl.pruning.engine import PruningMethod, TensorCounts
from prunectl.pruning.ledger import SCHEMA, BucketLedger, Ledger, Part, code_files, facts, is_as_noted, shares
from prunectl.pruning.masks import Threshold
from prunectl.pruning.plan import Plan
from prunectl.pruning.prune import Pruned, check_left, check_pattern, dropped_and_zeros, resolve_plan
from prunectl.pruning.request import PruneRequest, code_specs, from_json, resolve_method

_DONE, _SOURCE, _COUNTS = "done-", "source-", "counts-"
"""Prefixes of the file names of a shard's notes in the ledger."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A shard of the output."""

    name: str
    bytes: int
    pruned: int
    weights: int
    """Number of weights of its pruned tensors."""
    zeros: int
    is_new: bool
    """Whether this run wrote the shard, rather than an earlier one."""


@dataclass(frozen=True, slots=True)
class PartPruned:
    """The result of a part."""

    source: str
    request: PruneRequest
    part: Part
    shards: tuple[ShardResult, ...]
    missing: tuple[str, ...]
    """Shards of any part that are not written yet."""


def prune_part(
    source: Path,
    request: PruneRequest,
    output: Destination,
    part: Part,
    *,
    meter: ProgressFactory = no_progress,
    allow_empty: bool = False,
) -> PartPruned:
    """Prune the shards of a part, except those that are written already."""
    with reuse_worker():
        task = _Task.of(source, request, output, part)
        task.begin_or_check()
        mine = part.share_of(task.sizes)
        with meter(f"pruning part {part}", sum(task.sizes[name] for name in mine)) as bar:
            results = []
            for name in mine:
                results.append(task.noted(name) or task.write(name, allow_empty=allow_empty))
                bar.advance(task.sizes[name])
        # In an object store two parts may begin at the same time with different options, which is seen only now.
        task.ledger.check(task.note, task.model)
    missing = tuple(name for name in task.sizes if not task.is_noted(name))
    return PartPruned(str(source), request, part, tuple(results), missing)


def check(source: Path, request: PruneRequest, output: Destination, count: int) -> None:
    """Refuse an unsuitable model or output, or options that differ from other parts, before machines are started."""
    task = _Task.of(source, request, output, Part(1, count))
    if task.ledger.is_begun:
        task.ledger.check(task.note, task.model)


def prune_whole(
    source: Path,
    request: PruneRequest,
    output: Destination,
    *,
    has_digests: bool = False,
    meter: ProgressFactory = no_progress,
    allow_empty: bool = False,
) -> Pruned:
    """Prune a remote model, or to a remote output, with only one shard on this machine at a time."""
    prune_part(source, request, output, Part(1, 1), meter=meter, allow_empty=allow_empty)
    return join(source, request, output, has_digests=has_digests)


def join(
    source: Path,
    request: PruneRequest | None,
    output: Destination,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
) -> Pruned:
    """Join the shards of all parts: check that all are written and from one plan, and write the index last."""
    recorded = (ledger := Ledger.of(output.target)).task()
    recorded_request, count = from_json(recorded["request"]), recorded["parts"]
    if request is None and not is_trusted:
        check_untrusted(code_specs(recorded_request), str(ledger.folder))
    task = _Task.of(source, recorded_request if request is None else request, output, Part(1, count))
    task.begin_or_check()
    for number, share in enumerate(shares(task.sizes, count), 1):
        if missing := [name for name in share if task.noted(name) is None]:
            raise WorkError(
                f"part {number}/{count} of {output.target} is not done: {len(missing)} of its {len(share)} shards are "
                f"missing, such as {abbreviated(missing[0])}",
                hint=f"run it again: prunectl prune {source} -o {output.target} … --part {number}/{count}",
            )
    rows = {name: row for shard in task.sizes for name, row in task.entry(shard)["tensors"].items()}
    counts = {cut.tensor.name: TensorCounts(*rows[cut.tensor.name][1:]) for cut in task.plan.cuts}
    task.check_total(counts)
    task.ledger.close(task.model)
    before, after = task.stats(rows, has_digests=has_digests)
    task.ledger.remove()
    notes = outputs.notes_on_folder(task.model, output)
    return Pruned(task.request, task.sparsity, task.plan, counts, before, after, notes)


@dataclass(frozen=True)
class _Task:
    """The model, the plan and the ledger, which are the same for all parts."""

    model: ModelFile
    request: PruneRequest
    method: PruningMethod
    sparsity: float
    plan: Plan
    ledger: Ledger
    part: Part
    """The part of this run; it counts and prunes its own shards first."""

    @classmethod
    def of(cls, source: Path, request: PruneRequest, output: Destination, part: Part) -> _Task:
        """Open the model, and plan all of it."""
        model = registry.open_model(source)
        if model.format != "shards" or not outputs.is_folder(model, output):
            raise UsageError(
                f"{source} cannot be pruned in parts: --part divides the shards of a folder among machines, "
                "and writes a folder",
                hint=f"make shards first: prunectl export {source} -o OUT --shard-size 2GB",
            )
        ledger = Ledger.of(output.target)
        if not ledger.is_begun:
            outputs.check(model, output)
        method, sparsity, plan = resolve_plan(model, request, resolve_method(request))
        return cls(model, request, method, sparsity, plan, ledger, part)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of each shard, in the order of the model's files."""
        return {path.name: file_bytes(path) for path in self.model.files if path != self.model.path}

    @cached_property
    def _tensors(self) -> dict[str, list[Tensor]]:
        tensors: dict[str, list[Tensor]] = {name: [] for name in self.sizes}
        for tensor in self.model.tensors:
            tensors[shard_of(tensor)].append(tensor)
        return tensors

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        cuts: dict[str, list[planning.TensorPlan]] = {name: [] for name in self.sizes}
        for cut in self.plan.cuts:
            cuts[shard_of(cut.tensor)].append(cut)
        return {name: Plan(tuple(own), (), sum(cut.drop or 0 for cut in own)) for name, own in cuts.items()}

    @cached_property
    def _is_wide(self) -> bool:
        return engine.is_wide(self.plan)

    def _shard(self, name: str) -> ModelFile:
        path = self.model.path.parent / name
        return replace(
            self.model,
            path=path,
            files=(path,),
            format=registry.recognise(path).name,
            tensors=tuple(self._tensors[name]),
            folder=None,
        )

    def begin_or_check(self) -> None:
        """Create the ledger if this part is the first, and check that all parts have the same task."""
        if not self.ledger.is_begun:
            self.ledger.begin(self.note, self.model)
        self.ledger.check(self.note, self.model)

    @cached_property
    def note(self) -> dict[str, Any]:
        """The record of the task, which must be the same for all parts."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "parts": self.part.count,
            "request": json.loads(json.dumps(asdict(self.request))),
            "input": self._digest_of_input(),
            "plan": _digest([[cut.tensor.name, cut.drop] for cut in self.plan.cuts], self.plan.drop),
            "code": [sha256_of(file) for file in code_files(self.request)],
        }

    @cached_property
    def _digest(self) -> str:
        return _digest(self.note)

    def _read(self, name: str) -> dict[str, Any] | None:
        """A note on a shard; None if there is none, or if it is from another task."""
        note = self.ledger.read(name)
        if note is not None and not isinstance(note.get("task"), str):
            raise self.ledger.damaged(name)
        return note if note is not None and note["task"] == self._digest else None

    def _write(self, name: str, note: Mapping[str, Any]) -> None:
        self.ledger.write(name, {"task": self._digest, **note})

    def _digest_of_input(self) -> str:
        tensors = (
            [tensor.name, tensor.shape, str(tensor.dtype), tensor.storage.key, tensor.start]
            for tensor in self.model.tensors
        )
        return _digest(sha256_of(self.model.path), self.sizes, list(tensors))

    def is_noted(self, name: str) -> bool:
        """Whether the ledger says that a part wrote this shard."""
        return self.ledger.may_have(name) and self._read(f"{_DONE}{name}.json") is not None

    def noted(self, name: str) -> ShardResult | None:
        """The result for a shard that was written earlier; None if it is missing or not as recorded."""
        if not self.is_noted(name):
            return None
        entry = self.entry(name)
        if not self.ledger.has(name, entry["output"]):
            return None
        self._check_source(name)
        sizes = {cut.tensor.name: cut.tensor.size for cut in self._plans[name].cuts}
        rows = [entry["tensors"][cut] for cut in sizes]
        dropped, zeros = sum(row[1] for row in rows), sum(row[2] for row in rows)
        return ShardResult(name, entry["output"].get("bytes", 0), dropped, sum(sizes.values()), zeros, is_new=False)

    def entry(self, name: str) -> dict[str, Any]:
        """The record of a written shard in the ledger."""
        entry = self._read(f"{_DONE}{name}.json") or {}
        rows, names = entry.get("tensors"), {tensor.name for tensor in self._tensors[name]}
        if not isinstance(rows, dict) or rows.keys() != names or not isinstance(entry.get("output"), dict):
            raise self.ledger.damaged(f"{_DONE}{name}.json")
        if any(not isinstance(row, list) or [*map(type, row)] != [int, int, int] for row in rows.values()):
            raise self.ledger.damaged(f"{_DONE}{name}.json")
        return entry

    def _check_source(self, name: str) -> None:
        """Record the state of an input shard, or check that it has not changed since a part first recorded it."""
        path, note_name = self.model.path.parent / name, f"{_SOURCE}{name}.json"
        noted = self.ledger.read(note_name)
        if noted is None:
            # A remote file has a version, so that it need not be read for a digest.
            noted = {**facts(path), "sha256": "" if path in REMOTE else sha256_of(path)}
            self.ledger.write(note_name, noted)
        if not is_as_noted(path, noted):
            raise _changed(path)

    def write(self, name: str, *, allow_empty: bool) -> ShardResult:
        """Prune a shard, verify the result, and record it."""
        self._check_source(name)
        plan = self._plan_of(name)
        shard = self._shard(name)
        with downloaded(shard.path), self.ledger.placing(name, shard) as staged_path:
            with unchanged(file_states(shard.files), _changed):
                before = measure_stats(shard, shard.tensors, has_channels=False)
                counts = engine.execute(shard, plan, self.method, {shard.path: staged_path}) if plan.cuts else {}
                if not plan.cuts:
                    patch_files(shard, {shard.path: staged_path}, ())
                written = registry.open_model(staged_path)
                with workers(1) as background:
                    hashing = background.submit(sha256_of, staged_path)
                    after = engine.verify(shard, written, counts, has_channels=False)
                    check_pattern(written, plan, self.method)
                    if not allow_empty:
                        self._check_floors(counts)
                        check_left(before, counts)
                    digest = hashing.result()
            zeros = {row.name: row.zeros for row in after.layers}
            rows = {
                row.name: [row.zeros, counts[row.name].dropped if row.name in counts else 0, zeros[row.name]]
                for row in before.layers
            }
            # Recorded before the shard is renamed: a run that is killed after that would prune it twice otherwise.
            staged = self.ledger.facts_of_staged(staged_path)
            if staged:
                self._note(name, {**staged, "sha256": digest}, rows)
        placed = self.ledger.facts(name)
        if placed != staged:
            self._note(name, {**placed, "sha256": digest}, rows)
        result = self.noted(name)
        if result is None:
            raise WorkError(f"{self.ledger.target / name} was changed by another program while prunectl was running")
        return replace(result, is_new=True)

    def _note(self, name: str, output: Mapping[str, Any], rows: Mapping[str, Sequence[int | None]]) -> None:
        """Record that a shard was written, the state of its file, and the counts of its tensors."""
        self._write(f"{_DONE}{name}.json", {"part": str(self.part), "output": output, "tensors": rows})

    def _check_floors(self, counts: Mapping[str, TensorCounts]) -> None:
        """Refuse a tensor below its minimum: a whole run would rank again, but other shards may be written already."""
        dropped, zeros = dropped_and_zeros(counts)
        most = planning.most_dropped(self.plan, zeros)
        starved = [name for name, count in most.items() if dropped[name] > count]
        if self.method.pattern is None and starved:
            raise WorkError(
                f"fewer than 1 % would be left of {abbreviated(starved[0])}; its shard was not written",
                hint="use --scope layer or --exclude NAME",
            )

    def _plan_of(self, name: str) -> Plan:
        """The plan of a shard, with the joint threshold of all shards if they are ranked together."""
        plan = self._plans[name]
        if self.plan.drop == 0 or all(cut.drop is not None for cut in plan.cuts):
            return plan
        key, shares_of = self._joint_threshold
        below, ties, equal = shares_of[name]
        with scratch.temporary_folder() as folder:
            sources = engine.joint_sources(self._shard(name), plan, self.method, folder, is_wide=self._is_wide)
            threshold = Threshold(key, masks.split_ties(sources, key, ties, equal), is_wide=self._is_wide)
        return replace(plan, drop=below + ties, threshold=threshold)

    @cached_property
    def _joint_threshold(self) -> tuple[int, dict[str, tuple[int, int, int]]]:
        """The joint sort key, and for each shard how many scores are below it, are pruned as ties, and equal it.

        Sixteen bits in each pass, as in `radix_select`, with the counts of all shards added up. Each part counts its
        own shards first, then those that no part has counted yet, so that no part waits for another.
        """
        names = [name for name, plan in self._plans.items() if plan.cuts]
        mine = [name for name in self.part.share_of(self.sizes) if name in names]
        start = names.index(mine[0]) if mine else 0
        order = [*mine, *(name for name in (*names[start:], *names[:start]) if name not in mine)]
        prefix, below, shift = 0, 0, None
        below_by_name, last = dict.fromkeys(names, 0), {name: self._plans[name].size for name in names}
        while shift is None or shift > 0:
            counted = {name: self._counts(name, prefix, shift, last[name]) for name in order}
            shift = max(low for _, low in counted.values())
            by_digit = np.sum([counts for counts, _ in counted.values()], axis=0)
            prefix, below, _ = masks.next_digit(by_digit, prefix, below, self.plan.drop)
            digit = prefix % len(by_digit)
            for name, (counts, _) in counted.items():
                below_by_name[name] += int(counts[:digit].sum())
                last[name] = int(counts[digit])
        ties = self.plan.drop - below
        split: dict[str, tuple[int, int, int]] = {}
        for name in names:
            own_ties = min(ties, last[name])
            split[name] = (below_by_name[name], own_ties, last[name])
            ties -= own_ties
        return prefix, split

    def _counts(self, name: str, prefix: int, shift: int | None, total: int) -> tuple[NDArray[np.int64], int]:
        """The histogram of the next digit of a shard's scores, `total` in all, from the ledger or counted now."""
        self._check_source(name)
        note_name = f"{_COUNTS}{name}.{'all' if shift is None else shift}-{prefix:x}.json"
        if (note := self._read(note_name)) is None:
            shard = self._shard(name)
            with unchanged(file_states(shard.files), _changed), scratch.temporary_folder() as folder:
                sources = engine.joint_sources(shard, self._plans[name], self.method, folder, is_wide=self._is_wide)
                counted = [masks.count_digits(source, prefix, shift) for source in sources]
            check_unchanged(shard.path)
            totals_by_digit = np.sum([counts for counts, _ in counted], axis=0)
            digits = np.flatnonzero(totals_by_digit)
            low = max(low for _, low in counted)
            note = {"digits": digits.tolist(), "counts": totals_by_digit[digits].tolist(), "shift": low}
            self._write(note_name, note)
        try:
            counts = np.zeros(masks.BINS, np.int64)
            counts[np.array(note["digits"], np.int64)] = np.array(note["counts"], np.int64)
            low = int(note["shift"])
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self.ledger.damaged(note_name) from error
        # A shard without scores does not show their width, and records a shift of 0.
        widths = {0, *((16, 48) if shift is None else (shift - masks.DIGIT_BITS,))}
        if low not in widths or counts.min() < 0 or int(counts.sum()) != total:
            raise self.ledger.damaged(note_name)
        return counts, low

    def check_total(self, counts: Mapping[str, TensorCounts]) -> None:
        """Check that all parts together pruned as many weights as planned."""
        dropped = sum(count.dropped for count in counts.values())
        is_exact = not isinstance(self.method.pattern, BlockPattern) and self.request.nan != "zero"
        if is_exact and dropped != self.plan.drop:
            raise WorkError(f"{dropped} weights of {self.model.folder} were pruned instead of {self.plan.drop}")

    def stats(self, rows: Mapping[str, Sequence[int]], *, has_digests: bool) -> tuple[ModelStats, ModelStats]:
        """The statistics before and after; for a big or remote model from the ledger, without reading it again."""
        if not isinstance(self.ledger, BucketLedger) and self.model.nbytes <= outputs.BIG_BYTES:
            codec = get_codec(CodecName.GZIP, None)
            before, after = measure(self.model, codec), measure(registry.open_model(self.ledger.target), codec)
        else:
            before = _counted(self.model, rows, 0)
            sizes = (self.ledger.facts(name)["bytes"] for name in self.sizes)
            raw = file_bytes(self.model.path) + sum(sizes)
            after = replace(_counted(self.model, rows, 2), bytes=SizeStats(raw))
            if has_digests:
                written = registry.open_model(self.ledger.target)
                before, after = replace(before, sha256=sha256(self.model)), replace(after, sha256=sha256(written))
        return before, replace(after, path=str(self.ledger.target))


def _counted(model: ModelFile, rows: Mapping[str, Sequence[int]], column: int) -> ModelStats:
    stats = measure_stats(model, model.tensors, has_zeros=False)
    layers = tuple(replace(row, zeros=rows[row.name][column]) for row in stats.layers)
    return replace(stats, layers=layers, params=totals(layers))


def _changed(path: Path) -> InputError:
    hint = "remove the output, and start all parts again"
    return InputError(f"{path} was changed while the parts were pruned", hint=hint)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode("utf-8", "backslashreplace")).hexdigest()
