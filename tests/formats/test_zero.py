"""Checkpoints of DeepSpeed ZeRO: the slices of all ranks become the weights that were cut."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import load_file

from prunectl.formats.registry import open_model
from tests.running import here
from tests.safety.cost import assert_refused_cheaply, cost

RANKS = 3
STAGES = (1, 2, 3)
TRAINED = [
    {"a.weight": (7, 13), "b.weight": (5, 7), "embed.weight": (11, 13)},
    {"a.bias": (7,), "norm.weight": (7,), "scale": ()},
]
"""Two groups, as those with and without weight decay are; neither divides by the ranks."""


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape) for group in TRAINED for name, shape in group.items()}


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


def slices(stage: int) -> list[list[torch.Tensor]]:
    """What each rank has of each group, cut as DeepSpeed does it."""
    of = weights()
    if stage < 3:
        flat = [padded(torch.cat([of[name].reshape(-1) for name in group]), 2 * RANKS) for group in TRAINED]
        return [[group.chunk(RANKS)[rank].clone() for group in flat] for rank in range(RANKS)]
    cut = {name: padded(value.reshape(-1), RANKS).chunk(RANKS) for name, value in of.items()}
    return [[torch.cat([cut[name][rank] for name in group]) for group in TRAINED] for rank in range(RANKS)]


def save(home: Path, stage: int, **changes: Any) -> Path:
    """Write a checkpoint in the layout of DeepSpeed 0.19, with what else a trainer keeps beside it."""
    folder = home / "checkpoint/global_step5"
    folder.mkdir(parents=True)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, groups in enumerate(slices(stage)):
        moments = {number: {"exp_avg": group * 2, "step": torch.tensor(5.0)} for number, group in enumerate(groups)}
        state = {
            "zero_stage": stage,
            "partition_count": [RANKS, RANKS],
            "base_optimizer_state": {"state": moments},
            key: groups,
            **changes,
        }
        prefix = "bf16_" if stage == 1 else ""
        file = folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, file)
        module = {name: value.bfloat16() if stage < 3 else torch.empty(0) for name, value in weights().items()}
        frozen = torch.arange(15.0).bfloat16()
        model = {
            "module": {**module, "running": torch.arange(4), "head.weight": torch.zeros(11, 13)},
            "buffer_names": ["running"],
            "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in TRAINED],
            "shared_params": {"head.weight": "embed.weight"},
            "frozen_param_shapes": {"frozen.weight": torch.Size((3, 5))},
            "frozen_param_fragments": {
                "frozen.weight": frozen.chunk(RANKS)[rank].clone() if stage == 3 else frozen.reshape(3, 5)
            },
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model, folder / name)
    for name, text in (("latest", "global_step5"), ("zero_to_fp32.py", "#"), ("config.json", "{}")):
        (home / "checkpoint" / name).write_text(text)
    return home / "checkpoint"


@pytest.mark.parametrize("stage", STAGES)
def test_strip_leaves_every_weight_in_32_bits_and_what_lies_beside(tmp_path: Path, stage: int) -> None:
    saved = save(tmp_path, stage)
    assert here("strip", saved, "-o", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(tmp_path / "out/model.safetensors")
    expected = {**weights(), "running": torch.arange(4), "head.weight": weights()["embed.weight"]}
    expected["frozen.weight"] = torch.arange(15.0).bfloat16().reshape(3, 5)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_folder_of_the_step_is_the_checkpoint_too(tmp_path: Path, stage: int) -> None:
    saved = save(tmp_path, stage)
    assert here("export", saved / "global_step5", "-o", tmp_path / "out", "--shard-size", "500").code == 0
    opened = open_model(tmp_path / "out")
    of = {tensor.name: opened.read(tensor).tolist() for tensor in opened.tensors}
    assert all(of[name] == value.tolist() for name, value in weights().items())


def test_what_went_is_told_by_its_size(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    removed = {name: (part, int(nbytes)) for name, part, nbytes in here("strip", saved, "--dry-run").rows}
    padding = sum(-sum(math.prod(shape) for shape in group.values()) % (2 * RANKS) for group in TRAINED)
    moments = sum(value.numel() for value in weights().values()) + padding
    assert removed["optimizer"] == ("optimizer", 4 * (moments + 2 * RANKS))
    assert removed["latest"][0] == "training"


def test_inspect_tells_the_stage_and_reads_the_moments(tmp_path: Path) -> None:
    opened = open_model(save(tmp_path, 3))
    assert opened.about.producer == "deepspeed (ZeRO stage 3, 3 ranks)"
    moment = next(
        tensor
        for tensor in opened.tensors
        if tensor.name.endswith("rank1.optimizer_state_dict.base_optimizer_state.state.0.exp_avg")
    )
    assert opened.read(moment).tolist() == (slices(3)[1][0] * 2).tolist()
    assert here("prune", tmp_path / "checkpoint", "-s", "50%", "-o", tmp_path / "out").code == 3


def test_weights_that_no_group_has_are_taken_from_the_module(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    file = saved / "global_step5/mp_rank_00_model_states.pt"
    state = torch.load(file)
    state["module"]["frozen.weight"] = state.pop("frozen_param_fragments")["frozen.weight"]
    del state["frozen_param_shapes"]
    torch.save(state, file)
    assert here("strip", saved, "-o", tmp_path / "out.safetensors").code == 0
    assert load_file(tmp_path / "out.safetensors")["frozen.weight"].dtype is torch.bfloat16


def edit_model(saved: Path, **entries: Any) -> None:
    """Change what every rank saved of the model."""
    for file in saved.glob("global_step5/*_model_states.pt"):
        torch.save({**torch.load(file), **entries}, file)


@pytest.mark.parametrize("stage", STAGES)
def test_a_name_may_be_tied_to_one_that_is_tied_itself(tmp_path: Path, stage: int) -> None:
    saved = save(tmp_path, stage)
    edit_model(saved, shared_params={"head.weight": "between", "between": "embed.weight"})
    assert here("strip", saved, "-o", tmp_path / "out.safetensors").code == 0
    written = load_file(tmp_path / "out.safetensors")
    for name in ("head.weight", "between"):
        assert torch.equal(written[name], weights()["embed.weight"])


@pytest.mark.parametrize("pairs", [{"head.weight": "gone"}, {"head.weight": "head.weight"}])
def test_what_is_tied_to_no_tensor_is_taken_from_the_module(tmp_path: Path, pairs: dict[str, str]) -> None:
    saved = save(tmp_path, 2)
    edit_model(saved, shared_params=pairs)
    assert here("strip", saved, "-o", tmp_path / "out.safetensors").code == 0
    assert torch.equal(load_file(tmp_path / "out.safetensors")["head.weight"], torch.zeros(11, 13))


def test_what_is_tied_to_weights_that_were_left_out_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path, 3)
    edit_model(saved, shared_params={"head.weight": "gone"})
    done = here("strip", saved, "-o", tmp_path / "out.safetensors")
    assert done.code == 0
    assert "1 tensor, head.weight, is not in the checkpoint" in " ".join(done.err.split())
    assert "head.weight" not in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("pairs", [{"head.weight": ["embed.weight"]}, {"head.weight": 5}, {"a": "b", "b": {}}])
def test_ties_that_are_no_names_are_refused(tmp_path: Path, pairs: dict[str, Any]) -> None:
    saved = save(tmp_path, 2)
    edit_model(saved, shared_params=pairs)
    done = here("inspect", saved)
    assert done.code == 3
    assert "is damaged: its shared_params are not pairs of names" in " ".join(done.err.split())


def test_ties_in_a_circle_are_refused_where_the_module_is_empty(tmp_path: Path) -> None:
    saved = save(tmp_path, 3)
    edit_model(saved, shared_params={"head.weight": "other", "other": "head.weight"})
    done = here("inspect", saved)
    assert done.code == 3
    assert "is tied to a tensor that it does not hold" in " ".join(done.err.split())


def test_many_names_of_one_weight_do_not_make_much_of_little(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    long = {f"{number}": "embed.weight" for number in range(19_000)}
    edit_model(saved, shared_params=long)
    assert here("inspect", saved).code == 0
    wide = torch.zeros(120_000)
    edit_model(
        saved, buffer_names=["wide"], module={"wide": wide}, shared_params=dict.fromkeys(list(long)[:600], "wide")
    )
    done = here("inspect", saved)
    assert done.code == 3
    assert "reuse the bytes that they share too many times" in " ".join(done.err.split())


@pytest.mark.parametrize("value", [{"recipe": 1}, None, io.BytesIO(b"recipe")])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_module_keeps_that_is_no_tensor_is_left_out(tmp_path: Path, stage: int, value: Any) -> None:
    saved = save(tmp_path, stage)
    for file in saved.glob("global_step5/*_model_states.pt"):
        state = torch.load(file)
        state["module"]["a._extra_state"] = value
        torch.save(state, file)
    assert here("strip", saved, "-o", tmp_path / "out.safetensors").code == 0
    assert load_file(tmp_path / "out.safetensors").keys() == {*weights(), "running", "head.weight", "frozen.weight"}


def test_a_sparse_weight_is_not_left_out_in_silence(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    edit_model(saved, module={"sparse": torch.eye(4).to_sparse()})
    assert here("inspect", saved).code == 3


def without_zero(home: Path) -> Path:
    """Write what DeepSpeed saves where ZeRO is not used: a PyTorch file in the folder of its step."""
    saved = save(home, 2)
    for file in saved.glob("global_step5/*_optim_states.pt"):
        file.unlink()
    return saved


@pytest.mark.parametrize("other", ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt"])
def test_a_model_that_was_cut_without_zero_is_refused(tmp_path: Path, other: str) -> None:
    saved = without_zero(tmp_path)
    torch.save({}, saved / "global_step5" / other)
    for folder in (saved, saved / "global_step5"):
        for command in ("strip", "export"):
            done = here(command, folder, "-o", tmp_path / "out.safetensors")
            assert done.code == 3
            assert "was saved with model parallelism, which prunectl does not read" in " ".join(done.err.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_without_zero_is_only_read(tmp_path: Path) -> None:
    saved = without_zero(tmp_path)
    for command in (("prune", "-s", "50%"), ("strip",)):
        done = here(*command, saved, "-o", tmp_path / "out")
        assert done.code == 3
        assert "is a checkpoint of DeepSpeed, which prunectl only reads" in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()
    told = here("inspect", saved).err
    assert "`prunectl export` leaves it out" in told
    assert "`prunectl strip`" not in told
    assert here("export", saved, "-o", tmp_path / "out", "--to", "safetensors").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    file = saved / "global_step5/mp_rank_00_model_states.pt"
    assert here("prune", file, "-s", "50%", "-o", tmp_path / "out.pt").code == 0


def missing_rank(folder: Path) -> None:
    next(folder.glob("*rank_1_mp_rank_00_optim_states.pt")).unlink()


def missing_last_rank(folder: Path) -> None:
    next(folder.glob("*rank_2_mp_rank_00_optim_states.pt")).unlink()


def missing_model(folder: Path) -> None:
    next(folder.glob("*_model_states.pt")).unlink()


def parallel(folder: Path) -> None:
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")


def twice(folder: Path) -> None:
    (folder / "zero_pp_rank_01_mp_rank_00_optim_states.pt").write_bytes(b"")


def cut(folder: Path) -> None:
    file = next(folder.glob("*rank_1_mp_rank_00_optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_rank, "the optimizer states of rank 1 are missing"),
        (missing_last_rank, "is incomplete: 3 ranks saved it, but it has 2"),
        (missing_model, "model_states.pt is missing"),
        (parallel, "was saved with model parallelism"),
        (twice, "are of the same rank"),
        (cut, "is a damaged zip"),
    ],
)
def test_an_incomplete_checkpoint_is_a_sentence(tmp_path: Path, damage: Any, message: str) -> None:
    saved = save(tmp_path, 2)
    damage(saved / "global_step5")
    done = here("strip", saved, "-o", tmp_path / "out")
    assert done.code == 3
    assert message in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(8, 13), (1 << 40,), (-1,), ("a",), (1,) * 70])
@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_that_lie_are_refused(tmp_path: Path, stage: int, shape: Any) -> None:
    saved = save(tmp_path, stage)
    file = (
        next(saved.glob("global_step5/*_model_states.pt"))
        if stage == 2
        else (saved / "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt")
    )
    state = torch.load(file)
    state["param_shapes"][0]["a.weight"] = shape
    torch.save(state, file)
    done = here("strip", saved, "-o", tmp_path / "out")
    assert done.code == 3
    assert "is damaged" in done.err or "is refused" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 7}, "is not of ZeRO stage 1, 2 or 3"),
        ({"single_partition_of_fp32_groups": 1}, "it has no single_partition_of_fp32_groups"),
        ({"single_partition_of_fp32_groups": [torch.zeros(3, 3)]}, "is not flat"),
        ({"single_partition_of_fp32_groups": [torch.zeros(6)]}, "have other groups of weights"),
        ({"single_partition_of_fp32_groups": [torch.zeros(6), torch.zeros(6)]}, "do not hold all of"),
        ({"partition_count": 5}, "5 ranks saved it, but it has 3"),
    ],
)
def test_a_state_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    done = here("inspect", save(tmp_path, 2, **changes))
    assert done.code == 3
    assert message in done.err


def test_a_tag_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/latest").write_text("../checkpoint/global_step5")
    assert here("inspect", tmp_path / "other").code == 3
    assert here("inspect", saved).code == 0


def test_many_ranks_that_make_much_of_little_cost_little(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    made = io.BytesIO()
    with ZipFile(made, "w", ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}(" + b"N0" * 900_000 + b"u.")
    for rank in range(1, 40):
        (saved / f"global_step5/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(made.getvalue())
    assert_refused_cheaply(cost("inspect", saved, scratch=tmp_path / "scratch"))
