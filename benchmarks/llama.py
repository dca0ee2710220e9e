"""Perplexity of a small Llama without any training after pruning: magnitude, Wanda, SparseGPT and matched outputs.

The model is trained here, on one core in minutes, on text that ships with Python: the topics of its help and the
sources of its library, a tenth of the files held out. It is kept in `BENCH_LLAMA`, and trained again where that is
empty. `PYTHONPATH` must lead to `transformers`. The direct SparseGPT is the authors' algorithm in PyTorch, block by
block; where `BENCH_LLMCOMPRESSOR` names a folder with llm-compressor, that runs on the same file and text as well.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from zlib import crc32

from benchmarks.timing import PYTHON

HOME = Path(os.environ.get("BENCH_LLAMA", Path(tempfile.gettempdir()) / "prunectl-llama"))
LLMCOMPRESSOR = os.environ.get("BENCH_LLMCOMPRESSOR", "")
LENGTH, SAMPLES, HELD = 128, 128, 10
SEEDS = (0, 1, 2)
HEAD = ("--exclude", "lm_head*")
"""As in the papers, the output layer is left whole."""
OBS, WANDA = ("--strategy", "obs"), ("--strategy", "activation-magnitude")
METHODS = (
    ("magnitude", ()),
    ("activation-magnitude (Wanda)", WANDA),
    ("obs (SparseGPT)", OBS),
    ("magnitude + repair", ("--repair",)),
    ("obs + repair", (*OBS, "--repair")),
    ("magnitude + repair outputs", ("--repair", "outputs")),
    ("obs + repair outputs", (*OBS, "--repair", "outputs")),
)
SHAPES = (("50 %", ("-s", "50%")), ("70 %", ("-s", "70%")), ("2:4", ("--pattern", "2:4")))
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
