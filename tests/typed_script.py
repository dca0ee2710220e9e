"""What users write, which `mypy --strict` accepts, and below it their mistakes, each of which it must find.

No test runs this file: `make lint` checks its types, and a mistake that is found no longer is an unused `type: ignore`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import prunectl

x, y = np.zeros((4, 8), np.float32), np.zeros(4, np.int64)
print(prunectl.inspect("m.pt", layers="conv*").prunable_sparsity, prunectl.size(Path("m.pt"), codec="xz").bytes.packed)
pruned = prunectl.prune("m.pt", "out.pt", sparsity="80%", layer={"fc*": 0.9}, exclude="fc2", target_gzip=None)
print(pruned.output, pruned.before.path, pruned.to_dict()["ok"])
net: torch.nn.Linear = prunectl.prune(torch.nn.Linear(8, 4), sparsity=0.5)
arrays: dict[str, npt.NDArray[np.float32]] = prunectl.prune({"w": x}, sparsity=0.5, in_place=True)
state = prunectl.prune(OrderedDict(net.state_dict()), pattern="2:4")
print(prunectl.strip("m.pt", None, only=["optimizer"]).removed)
trained = prunectl.finetune(
    "m.pt", "out.pt", data=(x, y), builder=torch.nn.Bilinear, metric=[(max, "max")], on_epoch=lambda one: print(one.val)
)
print(trained.judged_after["accuracy"])
print(prunectl.finetune("m.pt", "out.pt", data=x, max_drop="1pp", tried=Path("tries")).search.best.sparsity)
print(prunectl.export("m.pt", "m.onnx", input=["x:?,8"], half=True).comparison)
print(prunectl.diff("a.pt", "b.pt", fail_on="shape").is_ok, prunectl.verify("a.pt", against="b.pt").is_ok)
print(prunectl.check("a*", config="prunectl.toml").failed, prunectl.init(".", margin=0.2).path)
print(prunectl.doctor().extras)
print(prunectl.sweep("m.onnx", "trials", data="d.npz", sparsities=["50%", 0.9], jobs=2).best)
print(prunectl.prune("llama", "small", part="1/2", sparsity="50%").missing)
print(prunectl.prune("llama", "small", join=True))
searched = prunectl.prune("m.pt", "out.pt", max_drop="1pp", data=x, metric="accuracy", manifest=Path("run.json"))
print(searched.search.best.sparsity if searched.search else None, prunectl.prune("m.pt", None, recipe="run.json"))
print(prunectl.prune("m.h5", "w.h5", sparsity=0.8, wrap=True, schedule="polynomial", begin=0, end="2000"))
looked = prunectl.inspect("m.pt", groups=True, sensitivity=True, data=(x, y), builder=torch.nn.Bilinear)
print(looked.groups, looked.sensitivity, looked.to_pandas())
print(prunectl.bench("a.onnx", "b.onnx", batch_size=[1, 8], on_progress=print).latencies)
print(prunectl.size("m.pt", on_progress=lambda now: print(now.done, now.total, now.label)))
print(prunectl.strip("m.pt", None, on_progress=print), prunectl.init("models", on_progress=print).proposals)
print(prunectl.export("m.pt", "m.npz", on_progress=lambda now: now.done).output, prunectl.doctor().to_dict())
print(prunectl.eval("m.onnx", "d.npz", metric=["accuracy"], on_progress=print).logs["accuracy"])
print(prunectl.bench("m.onnx", Path("n.onnx"), batch_size=[1, 16]).latencies[1][0].median.middle)
print(prunectl.evaluate("m.pt", torch.utils.data.TensorDataset(torch.zeros(1)), metric="accuracy").value)

prunectl.prune("m.pt", "out.pt", sparcity=0.5)  # type: ignore[call-overload]
prunectl.prune("m.pt", "out.pt", sparsity=[0.5])  # type: ignore[call-overload]
prunectl.prune("m.pt", sparsity=0.5)  # type: ignore[call-overload]
prunectl.inspect(3)  # type: ignore[arg-type]
