"""Networks as their papers draw them, with random weights: the usual kinds that channels are cut from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


def unit(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> Any:
    """A convolution that keeps the image, normalised, and what bends it."""
    body = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(body, nn.BatchNorm2d(outputs), act() if act else nn.Identity())


class AlexNet(nn.Module):
    """Krizhevsky 2012, in one column."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 1000)),
        )

    def forward(self, x: Any) -> Any:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 6), 1))


class Vgg16(nn.Module):
    """Simonyan 2014, configuration D."""

    def __init__(self) -> None:
        super().__init__()
        layers, inputs = [], 3
        for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for outputs in block:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 1000)),
        )

    def forward(self, x: Any) -> Any:
        return self.classifier(self.features(x).flatten(1))


class Residual(nn.Module):
    """A block beside which its input goes by."""

    def __init__(self, inputs: int, width: int, stride: int, *, is_narrow: bool) -> None:
        super().__init__()
        outputs = width * 4 if is_narrow else width
        if is_narrow:
            self.body = nn.Sequential(
                unit(inputs, width, 1), unit(width, width, 3, stride), unit(width, outputs, 1, act=None)
            )
        else:
            self.body = nn.Sequential(unit(inputs, width, 3, stride), unit(width, outputs, act=None))
        self.side = unit(inputs, outputs, 1, stride, act=None) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Any) -> Any:
        return F.relu(self.body(x) + self.side(x))


class ResNet(nn.Module):
    """He 2015."""

    def __init__(self, depths: tuple[int, ...], *, is_narrow: bool) -> None:
        super().__init__()
        self.stem, blocks, inputs = unit(3, 64, 7, 2), [], 64
        for stage, depth in enumerate(depths):
            width = 64 << stage
            for at in range(depth):
                blocks.append(Residual(inputs, width, 2 if stage and not at else 1, is_narrow=is_narrow))
                inputs = width * 4 if is_narrow else width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 1000)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class Inverted(nn.Module):
    """Wide inside, channel by channel, with or without an excitation."""

    def __init__(self, inputs: int, outputs: int, wide: int, stride: int, size: int, squeezed: int, act: Any) -> None:
        super().__init__()
        self.wide = unit(inputs, wide, 1, act=act) if wide != inputs else nn.Identity()
        self.deep = unit(wide, wide, size, stride, wide, act)
        self.down = nn.Conv2d(wide, squeezed, 1) if squeezed else None
        self.up = nn.Conv2d(squeezed, wide, 1) if squeezed else None
        self.out = unit(wide, outputs, 1, act=None)
        self.is_by = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        y = self.deep(self.wide(x))
        if self.down is not None and self.up is not None:
            y = y * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        y = self.out(y)
        return x + y if self.is_by else y


class Mobile(nn.Module):
    """MobileNetV2 (Sandler 2018) and EfficientNet-B0 (Tan 2019), by their tables."""

    def __init__(self, table: tuple[tuple[int, ...], ...], *, has_excitation: bool, act: Any) -> None:
        super().__init__()
        self.stem, blocks, inputs = unit(3, 32, 3, 2, act=act), [], 32
        for times, outputs, count, stride, size in table:
            for at in range(count):
                squeezed = inputs // 4 if has_excitation else 0
                blocks.append(Inverted(inputs, outputs, inputs * times, 1 if at else stride, size, squeezed, act))
                inputs = outputs
        self.blocks, self.last = nn.Sequential(*blocks), unit(inputs, 1280, 1, act=act)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Any) -> Any:
        x = self.last(self.blocks(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Fire(nn.Module):
    """Few channels, then two ways beside each other."""

    def __init__(self, inputs: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = (
            nn.Conv2d(inputs, few, 1),
            nn.Conv2d(few, many, 1),
            nn.Conv2d(few, many, 3, padding=1),
        )

    def forward(self, x: Any) -> Any:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class SqueezeNet(nn.Module):
    """Iandola 2016, version 1.1."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(64, 16, 64), Fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(128, 32, 128), Fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        self.classifier = nn.Conv2d(512, 1000, 1)

    def forward(self, x: Any) -> Any:
        return F.relu(self.classifier(self.features(x))).mean((2, 3))


class Inception(nn.Module):
    """Four ways beside each other."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.one = unit(inputs, one, 1)
        self.three = nn.Sequential(unit(inputs, three[0], 1), unit(*three))
        self.five = nn.Sequential(unit(inputs, five[0], 1), unit(*five, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(inputs, pooled, 1))

    def forward(self, x: Any) -> Any:
        return torch.cat([way(x) for way in (self.one, self.three, self.five, self.pooled)], 1)


class GoogLeNet(nn.Module):
    """Szegedy 2014, without the classifiers on its side."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.body = nn.Sequential(
            *(unit(3, 64, 7, 2), pool, unit(64, 64, 1), unit(64, 192), pool),
            *(Inception(192, 64, (96, 128), (16, 32), 32), Inception(256, 128, (128, 192), (32, 96), 64), pool),
            *(Inception(480, 192, (96, 208), (16, 48), 64), Inception(512, 160, (112, 224), (24, 64), 64)),
            *(Inception(512, 128, (128, 256), (24, 64), 64), Inception(512, 112, (144, 288), (32, 64), 64)),
            *(Inception(528, 256, (160, 320), (32, 128), 128), pool),
            *(Inception(832, 256, (160, 320), (32, 128), 128), Inception(832, 384, (192, 384), (48, 128), 128)),
        )
        self.head = nn.Linear(1024, 1000)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet-121 (Huang 2016): each layer reads what all before it in the block made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, width = unit(3, 64, 7, 2), 64
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for at, depth in enumerate((6, 12, 24, 16)):
            layers = nn.ModuleList()
            for _ in range(depth):
                first = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 128, 1, bias=False))
                layers.append(
                    nn.Sequential(first, nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 32, 3, 1, 1, bias=False))
                )
                width += 32
            self.blocks.append(layers)
            if at < 3:
                self.between.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
                width //= 2
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 1000)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        for at, block in enumerate(self.blocks):
            made = [x]
            for layer in block:
                made.append(layer(torch.cat(made, 1)))
            x = torch.cat(made, 1)
            if at < len(self.between):
                x = self.between[at](x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Unet(nn.Module):
    """Ronneberger 2015, its edges padded."""

    def __init__(self, first: int = 32) -> None:
        super().__init__()
        widths = [first << at for at in range(5)]
        pairs = list(zip([3, *widths], widths, strict=False))
        self.down = nn.ModuleList(nn.Sequential(unit(a, b), unit(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, b // 2, 2, 2) for b in reversed(widths[1:]))
        self.after = nn.ModuleList(nn.Sequential(unit(b, b // 2), unit(b // 2, b // 2)) for b in reversed(widths[1:]))
        self.out = nn.Conv2d(first, 2, 1)

    def forward(self, x: Any) -> Any:
        made = []
        for at, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if at else x)
            made.append(x)
        for up, after, beside in zip(self.up, self.after, made[-2::-1], strict=True):
            x = after(torch.cat([beside, up(x)], 1))
        return self.out(x)


class Shuffled(nn.Module):
    """Half of the channels are worked on, and then all are dealt out in turns."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, taken = outputs // 2, inputs if stride > 1 else inputs // 2
        self.side = (
            nn.Sequential(unit(inputs, inputs, 3, 2, inputs, None), unit(inputs, half, 1)) if stride > 1 else None
        )
        self.body = nn.Sequential(unit(taken, half, 1), unit(half, half, 3, stride, half, None), unit(half, half, 1))

    def forward(self, x: Any) -> Any:
        one, other = (self.side(x), x) if self.side is not None else x.chunk(2, 1)
        x = torch.cat([one, self.body(other)], 1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """Ma 2018, version 2, width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, blocks, inputs = unit(3, 24, 3, 2), [], 24
        for outputs, count in ((116, 4), (232, 8), (464, 4)):
            for at in range(count):
                blocks.append(Shuffled(inputs, outputs, 1 if at else 2))
                inputs = outputs
        self.blocks, self.last, self.head = nn.Sequential(*blocks), unit(464, 1024, 1), nn.Linear(1024, 1000)

    def forward(self, x: Any) -> Any:
        return self.head(self.last(self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1))).mean((2, 3)))


class Next(nn.Module):
    """A block of ConvNeXt, its norm and its dense layers with the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-1))

    def forward(self, x: Any) -> Any:
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.scale * self.back(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Last(nn.Module):
    """A layer norm over channels that come first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Any) -> Any:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Liu 2022, tiny."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = [nn.Conv2d(3, 96, 4, 4), Last(96)]
        for at, depth in enumerate((3, 3, 9, 3)):
            width = 96 << at
            layers += [Last(width // 2), nn.Conv2d(width // 2, width, 2, 2)] if at else []
            layers += [Next(width) for _ in range(depth)]
        self.body, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.body(x).mean((2, 3))))


class Block(nn.Module):
    """A layer of an encoder: attention, then two dense layers, each beside what goes by."""

    def __init__(self, width: int, heads: int, *, is_norm_first: bool) -> None:
        super().__init__()
        self.heads, self.is_norm_first = heads, is_norm_first
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.back, self.norm, self.norm_2 = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Any) -> Any:
        batch, length, _ = x.shape
        parts = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(*parts)
        return self.back(seen.transpose(1, 2).flatten(2))

    def forward(self, x: Any) -> Any:
        if self.is_norm_first:
            x = x + self.attend(self.norm(x))
            return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))
        x = self.norm(x + self.attend(x))
        return self.norm_2(x + self.narrow(F.gelu(self.wide(x))))


class Vit(nn.Module):
    """Dosovitskiy 2020, tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 192, 16, 16), nn.Parameter(torch.zeros(1, 1, 192))
        self.places = nn.Parameter(torch.randn(1, 197, 192) * 0.02)
        self.blocks = nn.Sequential(*(Block(192, 3, is_norm_first=True) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 1000)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Bert(nn.Module):
    """Devlin 2018, four layers of width 256."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 256), nn.Embedding(512, 256)
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 2)
        self.blocks = nn.Sequential(*(Block(256, 4, is_norm_first=False) for _ in range(4)))

    def forward(self, words: Any) -> Any:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.head(torch.tanh(self.blocks(self.norm(x))[:, 0]))


class Lstm(nn.Module):
    """Hochreiter 1997: words, two layers, a class."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = (
            nn.Embedding(10000, 128),
            nn.LSTM(128, 256, 2, batch_first=True),
            nn.Linear(256, 2),
        )

    def forward(self, words: Any) -> Any:
        return self.head(self.inner(self.words(words))[0][:, -1])


@dataclass(frozen=True)
class Known:
    """A network, and what goes into it."""

    name: str
    make: Callable[[], nn.Module]
    shape: str = "1,3,224,224"


_V2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
_B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def lively(net: nn.Module) -> nn.Module:
    """Return a network whose normalisations have seen something, so that a signal is left where it ends."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(values, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.05, 0.15)
    return net.eval()


def resnet18() -> nn.Module:
    return ResNet((2, 2, 2, 2), is_narrow=False)


def resnet50() -> nn.Module:
    return ResNet((3, 4, 6, 3), is_narrow=True)


def mobilenet() -> nn.Module:
    return Mobile(_V2, has_excitation=False, act=nn.ReLU6)


def efficientnet() -> nn.Module:
    return Mobile(_B0, has_excitation=True, act=nn.SiLU)


NETS = (
    Known("AlexNet", AlexNet),
    Known("VGG-16", Vgg16),
    Known("ResNet-18", resnet18),
    Known("ResNet-50", resnet50),
    Known("MobileNetV2", mobilenet),
    Known("SqueezeNet", SqueezeNet),
    Known("GoogLeNet", GoogLeNet),
    Known("DenseNet-121", Dense),
    Known("U-Net", Unet, "1,3,128,128"),
    Known("ShuffleNetV2", ShuffleNet),
    Known("ConvNeXt-tiny", ConvNeXt),
    Known("EfficientNet-B0", efficientnet),
    Known("ViT-tiny", Vit),
    Known("BERT-like", Bert, "1,64:i64"),
    Known("LSTM", Lstm, "1,32:i64"),
)
