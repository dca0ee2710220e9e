"""More networks, as PyTorch lets people write them."""

from __future__ import annotations

from typing import Any

from tests.channels.nets import F, conv, nn, torch


class Functional(nn.Module):
    """Sizes worked out on the way, work in place, a constant, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.side = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head, self.unused = nn.Linear(8 * 16, 5), nn.Linear(3, 2)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("ramp", torch.arange(16.0).view(1, 1, 4, 4), persistent=False)

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        x += self.side(x)
        x = F.adaptive_avg_pool2d(x * self.gamma, 4) * self.ramp
        batch, channels = x.shape[:2]
        x = x.view(batch, channels * x.shape[2] * x.shape[3])
        return self.head(F.dropout(x, 0.5, self.training))


class Shared(nn.Module):
    """A convolution that is used twice, and a matrix that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(24, 5)
        self.other.weight = self.one.weight

    def forward(self, x: Any) -> Any:
        x = F.relu(self.stem(x))
        x = F.relu(self.twice(F.relu(self.twice(x)))).mean((2, 3))
        return self.head(torch.cat([F.relu(self.one(x)), F.relu(self.other(x))], -1))


class Several(nn.Module):
    """An image and a row of numbers go in; a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.row = conv(3, 8), nn.Linear(6, 8)
        self.scores, self.axes = nn.Linear(8, 5), nn.Conv2d(8, 2, 1)

    def forward(self, image: Any, row: Any) -> Any:
        x = self.image(image) * torch.sigmoid(self.row(row))[:, :, None, None]
        return {"scores": self.scores(x.mean((2, 3))), "more": [self.axes(x), row.sum(1)]}


class Words(nn.Module):
    """Words, a recurrent layer over them in both directions, and what it ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 6), nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.gated, self.head = nn.GRU(16, 6), nn.Linear(6, 3)

    def forward(self, words: Any) -> Any:
        x, _ = self.inner(self.table(words))
        _, last = self.gated(x.transpose(0, 1))
        return self.head(last[-1])


class Encoder(nn.Module):
    """Patches, one token more, attention by the function that PyTorch has for it, and a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.rand(1, 1, 16))
        self.norm, self.mix, self.back = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.out, self.head = nn.Linear(16, 24), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        batch, length, width = x.shape
        mixed = self.mix(self.norm(x)).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        query, key, value = mixed.unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.back(seen.transpose(1, 2).reshape(batch, length, -1))
        x = x + self.out(F.glu(self.gate(x)))
        return self.head(x[:, 0])


class Layered(nn.Module):
    """An encoder's layer as PyTorch has it, with queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 16)
        self.inner = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.inner(self.start(x)).mean(1))


class Tricks(nn.Module):
    """Channels that become positions, groups of one, and means that are spread again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(16, 16), nn.Conv2d(4, 6, 3)
        self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        x = self.two(F.silu(F.pixel_shuffle(self.norm(self.one(x)), 2), inplace=True))
        batch, channels = x.shape[:2]
        gate = torch.sigmoid(self.gate(F.adaptive_max_pool2d(x, 1).view(batch, channels)))
        return self.head((x * gate.view(batch, channels, 1, 1).expand_as(x))[..., 1::2, :].mean((-1, -2)))


class Plain(nn.Sequential):
    """Layers in a row, with no names but numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(128, 5))


class Endless(nn.Module):
    """What runs depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        x = self.head(x)
        while x.sum() > 0:
            x = x - 1
        return x


def perceptron() -> Any:
    """Layers that take rows of numbers."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def sequential() -> Any:
    """A module of a class that torch has itself."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
