"""Small networks of the usual kinds, exported by PyTorch with random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
F = nn.functional


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> Any:
    """A convolution that keeps the image, normalised."""
    body = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(body, nn.BatchNorm2d(outputs), nn.ReLU())


def built(kind: Any) -> Any:
    """Return a network as if trained: no number of its normalisation is what it was, the same every time."""
    torch.manual_seed(7)
    net = kind().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return net


class Vgg(nn.Module):
    """Convolutions in a row, flattened into dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 12), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        return self.head(x.view(x.size(0), 12 * 16))


class Residual(nn.Module):
    """Two blocks: one on the stream as it is, one that makes it wider through a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.one, self.two = nn.Sequential(conv(8, 6), conv(6, 8)), nn.Sequential(conv(8, 10, stride=2), conv(10, 16))
        self.down = conv(8, 16, 1, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        x = F.relu(x + self.one(x))
        x = F.relu(self.down(x) + self.two(x))
        return self.head(x.mean((2, 3)))


class Mobile(nn.Module):
    """Narrow, wide and channel by channel, narrow again, around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.block = nn.Sequential(
            nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(), conv(24, 24, groups=24), nn.Conv2d(24, 8, 1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Each layer reads what all before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 6), conv(6, 8), conv(14, 10)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x: Any) -> Any:
        one = self.one(x)
        two = self.two(one)
        three = self.three(torch.cat([one, two], 1))
        x = F.relu(self.norm(torch.cat([one, two, three], 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Unet(nn.Module):
    """Down, and up again beside what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.low, self.deep = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up, self.mid, self.last = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 10), conv(18, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Any) -> Any:
        first = self.first(x)
        low = self.low(F.max_pool2d(first, 2))
        mid = self.mid(torch.cat([self.up(self.deep(F.max_pool2d(low, 2))), low], 1))
        wide = F.interpolate(mid, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.last(torch.cat([wide, first], 1)))


class Excite(nn.Module):
    """Squeeze and excite: channels scaled by what dense layers make of their means; hard swish, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = conv(3, 16), nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.slope, self.last, self.head = nn.PReLU(16), nn.Conv2d(16, 12, 3, groups=4), nn.Linear(12, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        x = x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.hardswish(self.last(self.slope(x))).mean((2, 3)))


class Squeeze(nn.Module):
    """Fire: few channels, then two ways beside each other; the last convolution is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 12, 3, 2), nn.Conv2d(12, 4, 1)
        self.one, self.three, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.squeeze(F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)
        return F.adaptive_avg_pool2d(F.relu(self.out(x)), 1).flatten(1)


class Split(nn.Module):
    """Halves that go their own ways, as in the necks of detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.last = conv(3, 16), conv(8, 8), conv(24, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        one, two = self.stem(x).chunk(2, 1)
        return self.head(self.last(torch.cat([one, two, two + self.side(two)], 1)).mean((2, 3)))


class Attention(nn.Module):
    """Patches, an encoder's layer, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.mix = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 48)
        self.back, self.other_norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.inside = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, length, _ = x.shape
        query, key, value = (
            part.reshape(batch, length, 4, 4).transpose(1, 2) for part in self.mix(self.norm(x)).chunk(3, -1)
        )
        seen = (query @ key.transpose(-2, -1) / 2).softmax(-1) @ value
        x = x + self.back(seen.transpose(1, 2).reshape(batch, length, 16))
        return self.head((x + self.inside(self.other_norm(x))).mean(1))


class Shuffle(nn.Module):
    """Channels of two groups, dealt out in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = conv(3, 8), conv(8, 8, groups=2), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(self.last(x).mean((2, 3)))


class Groups(nn.Module):
    """Channels normalised in groups of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = conv(3, 8), nn.GroupNorm(4, 8), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


class Recurrent(nn.Module):
    """Rows of an image as the steps of a recurrent layer."""

    def __init__(self, kind: str = "LSTM", *, is_both: bool = False, units: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(48, 6)
        self.cell = getattr(nn, kind)(6, units, batch_first=True, bidirectional=is_both)
        self.head = nn.Linear(2 * units if is_both else units, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.cell(self.first(x.transpose(1, 2).flatten(2)).relu())[0].mean(1))


NETS = (Vgg, Residual, Mobile, Dense, Unet, Excite, Squeeze, Split)


def export(kind: Any, path: Path, *, is_open: bool = True, opset: int = 17, is_folded: bool = False) -> Path:
    """Write a network as ONNX, its batch open or 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            built(kind),
            (torch.randn(1, 3, 16, 16),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}} if is_open else None,
            # As it was trained: batch normalisation stays what it is.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=is_folded,
        )
    return path
