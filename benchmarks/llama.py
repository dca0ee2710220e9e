"""Perplexity of a small Llama that is pruned and not trained after that: magnitude, Wanda, SparseGPT, matched outputs.

The model is trained here, on one core in minutes, on text that ships with Python: the topics of its help and the
sources of its library, a tenth of the files held out. It is kept in `BENCH_LLAMA`, and trained again where that is
empty. `PYTHONPATH` must lead to `transformers`. Beside it runs the authors' algorithm of SparseGPT in PyTorch, block by
block, and where `BENCH_LLMCOMPRESSOR` is what `PYTHONPATH` needs for it, llm-compressor: all on the same sequences. The
memory of both is measured on a larger Llama of random weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from benchmarks.timing import PYTHON, cost, output_of, show

HOME = Path(os.environ.get("BENCH_LLAMA", Path(tempfile.gettempdir()) / "prunectl-llama"))
LLMCOMPRESSOR = os.environ.get("BENCH_LLMCOMPRESSOR", "")
LENGTH, HELD = 128, 10
SEEDS = (0, 1)
"""Of which sequences calibrate."""
JUDGED = 192
"""Held-out sequences that are looked at."""
SHAPES = {"50 %": ("50%", ""), "70 %": ("70%", ""), "2:4": ("", "2:4")}
_OBS, _WANDA = {"strategy": "obs"}, {"strategy": "activation-magnitude"}
_MATCHED = {"repair": "outputs", "repair_steps": 100, "batch_size": 8, "samples": 512}
METHODS = {
    "magnitude": {},
    "Wanda": _WANDA,
    "SparseGPT": _OBS,
    "magnitude, repaired": {"repair": "layers"},
    "SparseGPT, repaired": {**_OBS, "repair": "layers"},
    "magnitude, outputs matched": _MATCHED,
    "SparseGPT, outputs matched": {**_OBS, **_MATCHED},
}
_TRAIN = """
import sys, time, torch, tokenizers, transformers
home, steps, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
text = open(f"{home}/train.txt", encoding="utf-8").read()
bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = bytewise, tokenizers.decoders.ByteLevel()
tokenizer.train_from_iterator(text.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(
    vocab_size=2048, special_tokens=["<s>", "</s>"], initial_alphabet=bytewise.alphabet(), show_progress=False))
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
ids = torch.tensor(fast(text)["input_ids"])
print(len(ids), "tokens", flush=True)
config = transformers.LlamaConfig(
    vocab_size=2048, hidden_size=160, intermediate_size=432, num_hidden_layers=5, num_attention_heads=5,
    num_key_value_heads=5, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
net = transformers.LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(net.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
begun = time.perf_counter()
for step in range(steps):
    rows = torch.stack([ids[at : at + length] for at in torch.randint(len(ids) - length, (8,)).tolist()])
    loss = net(rows, labels=rows).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 99:
        print(step + 1, round(loss.item(), 3), round(time.perf_counter() - begun), "s", flush=True)
net.save_pretrained(f"{home}/model")
fast.save_pretrained(f"{home}/model")
"""


def text() -> tuple[str, str]:
    """What is trained on and what is held out, file by file."""
    from pydoc_data import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))}
    # The topics are prose, and there are fewer of them: they count three times.
    parts: tuple[list[str], list[str]] = ([], [])
    for name, content in {**files, **topics.topics}.items():
        is_held = crc32(name.encode()) % HELD == 0
        parts[is_held].extend([content] * (1 if is_held or name in files else 3))
    return "\n".join(parts[0]), "\n".join(parts[1])


def train(steps: int = 700) -> Path:
    """The trained folder, made where there is none."""
    model = HOME / "model"
    if not (model / "model.safetensors").is_file():
        HOME.mkdir(parents=True, exist_ok=True)
        for name, content in zip(("train.txt", "test.txt"), text(), strict=True):
            (HOME / name).write_text(content, encoding="utf-8")
        subprocess.run([PYTHON, "-c", _TRAIN, HOME, str(steps), str(LENGTH)], check=True)
    return model


_RUN = """
import json, sys, tempfile, numpy as np, prunectl, transformers
home, length, judged, seeds, shapes, methods = sys.argv[1], *map(json.loads, sys.argv[2:])
fast = transformers.AutoTokenizer.from_pretrained(f"{home}/model")
ids, test = (np.array(fast(open(f"{home}/{part}.txt").read())["input_ids"]) for part in ("train", "test"))

def rows(ids, count, seed):
    begins = np.random.default_rng(seed).choice(len(ids) // length - 1, count, replace=False) * length
    return ids[begins[:, None] + np.arange(length + 1)]

np.save(f"{home}/test.npy", rows(test, judged, 0))

def judge(folder):
    return prunectl.evaluate(folder, f"{home}/test.npy", metric="perplexity").value

print(json.dumps(["dense", "", 0, judge(f"{home}/model")]), flush=True)
for seed in seeds:
    np.save(f"{home}/few{seed}.npy", rows(ids, 128, seed))
    np.save(f"{home}/many{seed}.npy", rows(ids, 512, seed))
    for name, options in methods.items():
        for shape, (sparsity, pattern) in shapes.items():
            own = {"sparsity": sparsity} if sparsity else {"pattern": pattern}
            if options:
                own["data"] = f"{home}/{'many' if 'samples' in options else 'few'}{seed}.npy"
            elif seed:
                continue
            with tempfile.TemporaryDirectory() as folder:
                prunectl.prune(f"{home}/model", f"{folder}/out", exclude=["lm_head*"], **own, **options)
                print(json.dumps([name, shape, seed, judge(f"{folder}/out")]), flush=True)
"""
_DIRECT = """
import sys, numpy as np, torch, transformers
source, target, data, sparsity, pattern = sys.argv[1:]
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
rows = torch.from_numpy(np.load(data)[:, :-1].astype("i8"))
calls = []

class Catcher(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
    def forward(self, hidden, **more):
        calls.append((hidden, more))
        raise StopIteration

def prune(layer, hessian):
    weights = layer.weight.data.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weights[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for begin in range(0, weights.shape[1], 128):
        end = min(begin + 128, weights.shape[1])
        part, own = weights[:, begin:end].clone(), inverse[begin:end, begin:end]
        errors, mask = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        if not pattern:
            costs = part ** 2 / own.diagonal() ** 2
            mask = costs <= costs.flatten().sort()[0][int(costs.numel() * float(sparsity))]
        for column in range(end - begin):
            if pattern and column % 4 == 0:
                costs = part[:, column : column + 4] ** 2 / own.diagonal()[column : column + 4] ** 2
                mask.scatter_(1, column + costs.topk(2, dim=1, largest=False)[1], True)
            kept = part[:, column].masked_fill(mask[:, column], 0)
            error = (part[:, column] - kept) / own[column, column]
            part[:, column:] -= error[:, None] @ own[column, column:][None]
            part[:, column], errors[:, column] = kept, error
        weights[:, begin:end] = part
        weights[:, end:] -= errors @ inverse[begin:end, end:]
    layer.weight.data = weights

with torch.no_grad():
    blocks = model.model.layers
    blocks[0] = Catcher(blocks[0])
    for batch in rows.split(8):
        try:
            model(batch, use_cache=False)
        except StopIteration:
            pass
    blocks[0] = blocks[0].block
    hidden = [hidden for hidden, _ in calls]
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        hessians = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers}
        def see(layer, args, _):
            flat = args[0].flatten(0, 1)
            hessians[layer] += 2 / rows.numel() * flat.T @ flat
        hooks = [layer.register_forward_hook(see) for layer in layers]
        for states, (_, more) in zip(hidden, calls):
            block(states, **more)
        for hook in hooks:
            hook.remove()
        for layer, hessian in hessians.items():
            prune(layer, hessian)
        hidden = [block(states, **more) for states, (_, more) in zip(hidden, calls)]
model.save_pretrained(target)
transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""
_COMPRESSOR = """
import sys, numpy as np, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target, data, sparsity, pattern = sys.argv[1:]
torch.set_num_threads(1)
rows = np.load(data)[:, :-1]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
examples = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
recipe = SparseGPTModifier(sparsity=float(sparsity or 0.5), mask_structure=pattern or "0:0", ignore=["re:.*lm_head"])
oneshot(model=model, processor=tokenizer, dataset=examples, recipe=recipe, max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows))
model.save_pretrained(target, save_compressed=False)
tokenizer.save_pretrained(target)
"""
_JUDGE = """
import json, sys, prunectl
home, *folders = sys.argv[1:]
print(json.dumps([prunectl.evaluate(one, f"{home}/test.npy", metric="perplexity").value for one in folders]))
"""
_LARGE = """
import sys, torch, transformers
config = transformers.LlamaConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=16, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
_BY_PRUNECTL = """
import sys
import prunectl.training.torch.blockwise as blockwise
from prunectl.cli import main
if sys.argv.pop(1) == "whole":
    blockwise.open_blockwise = lambda *_: None
main()
"""


def run() -> None:
    """Print the perplexities, then the memory."""
    train()
    words = (HOME, *map(json.dumps, (LENGTH, JUDGED, SEEDS, SHAPES, METHODS)))
    found: dict[tuple[str, str], list[float]] = {}
    with subprocess.Popen([PYTHON, "-c", _RUN, *map(str, words)], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            name, shape, seed, value = json.loads(line)
            found.setdefault((name, shape), []).append(value)
            _tell(f"{name} {shape}, seed {seed}: {value:.2f}")
    if child.returncode:
        raise RuntimeError("the runs of prunectl failed")
    for seed in SEEDS:
        for name, values in _others(HOME / "model", HOME / f"few{seed}.npy").items():
            for shape, value in values.items():
                found.setdefault((name, shape), []).append(value)
    names = dict.fromkeys(name for name, _ in found if name != "dense")
    rows = [(name, *(_shown(found[name, shape]) for shape in SHAPES)) for name in names]
    (dense,) = found["dense", ""]
    show(f"llama: perplexity, dense {dense:.2f}, seeds {SEEDS}", ("method", *SHAPES), rows)
    memory()


def memory() -> None:
    """Print what a larger model of random weights takes, with an eighth of the sequences."""
    large, few = HOME / "large", HOME / "fewer.npy"
    shutil.rmtree(large, ignore_errors=True)
    subprocess.run([PYTHON, "-c", _LARGE, HOME / "model", large], check=True)
    np.save(few, np.load(HOME / "few0.npy")[:16])
    out, rows = str(HOME / "out"), []
    for title, words in (
        *((f"prunectl, {name}, {how}", _command(large, out, few, name, how)) for name, how in _MEASURED),
        *((name, [*python, script, str(large), out, str(few), "0.5", ""]) for name, python, script in _scripts()),
        ("imports alone", [PYTHON, "-c", "import prunectl.training.torch.blockwise, transformers.models.llama"]),
    ):
        shutil.rmtree(out, ignore_errors=True)
        found = cost(words, runs=1)
        rows.append((title, f"{found.seconds:.0f} s", f"{found.peak_bytes / 1e6:,.0f} MB"))
        _tell(", ".join(rows[-1]))
    nbytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    show(f"llama: {nbytes / 1e6:,.0f} MB of weights, 50 %, 16 sequences", ("program", "time", "peak memory"), rows)


_MEASURED = (("activation-magnitude", "whole"), ("activation-magnitude", "one block"), ("obs", "one block"))


def _command(model: Path, out: str, data: Path, strategy: str, how: str) -> list[str]:
    options = ["--strategy", strategy, "--data", str(data), "--batch-size", "8", "--exclude", "lm_head*"]
    return [PYTHON, "-c", _BY_PRUNECTL, how, "prune", str(model), "-o", out, "-s", "50%", *options]


def _scripts() -> list[tuple[str, list[str], str]]:
    """SparseGPT of others: a title, what runs it, and the script."""
    found = [("SparseGPT, direct", [PYTHON, "-c"], _DIRECT)]
    if LLMCOMPRESSOR:
        found.append(
            ("SparseGPT, llm-compressor", ["/usr/bin/env", f"PYTHONPATH={LLMCOMPRESSOR}", PYTHON, "-c"], _COMPRESSOR)
        )
    return found


def _others(model: Path, data: Path) -> dict[str, dict[str, float]]:
    """The perplexities of SparseGPT as others have it."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words, script in _scripts():
            outs = []
            for number, (sparsity, pattern) in enumerate(SHAPES.values()):
                out, share = Path(folder) / f"{name}{number}", str(float(sparsity.rstrip("%") or 50) / 100)
                output_of(*words, script, model, out, data, share, pattern)
                outs.append(out)
            values = json.loads(output_of(PYTHON, "-c", _JUDGE, HOME, *outs).splitlines()[-1])
            found[name] = dict(zip(SHAPES, values, strict=True))
            _tell(f"{name}, {data.stem}: {values}")
    return found


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _tell(text: str) -> None:
    print(f"llama: {text}", file=sys.stderr, flush=True)
