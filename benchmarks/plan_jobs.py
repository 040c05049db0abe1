"""Twelve jobs of different kinds on generated data, small enough that forty steps take seconds; for benchmarks/plan.py."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from zoo_networks import densenet, mobilenet, plain_cnn, resnet

import delest

STEPS = 40
HELD_BACK = 0.25  # of the rows: validation, selection and test


def images(side: int, batch: int, classes: int = 10, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    rows = int(STEPS * batch / (1 - HELD_BACK)) + batch
    return random.standard_normal((rows, channels, side, side), np.float32), random.integers(0, classes, rows)


def tokens(length: int, batch: int, vocabulary: int = 2000, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    rows = int(STEPS * batch / (1 - HELD_BACK)) + batch
    return random.integers(0, vocabulary, (rows, length)), random.integers(0, classes, rows)


class Attending(nn.Module):
    """A transformer's layer, normalised before."""

    def __init__(self, width: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out, self.heads, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, causal
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.mix(self.before(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.perceptron(self.between(x))


class Vision(nn.Module):
    def __init__(self, width: int = 192, layers: int = 6, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.layers = nn.ModuleList([Attending(width) for _ in range(layers)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Text(nn.Module):
    """`causal`: the next token of each is learnt; else a class for each row."""

    def __init__(self, width: int = 192, layers: int = 4, vocabulary: int = 2000, causal: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Attending(width, causal=causal) for _ in range(layers)])
        self.head, self.causal = nn.Linear(width, vocabulary if causal else 10), causal

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x if self.causal else x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2000, width)
        self.layers = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x))[0][:, -1])


class Residual1d(nn.Module):
    """Dilated convolutions over a sequence, as WaveNet has them, with layer normalisation."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.wide = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.back = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(nn.functional.glu(self.wide(self.norm(x)), 1))


def dilated(width: int = 96, layers: int = 6) -> nn.Module:
    blocks = [Residual1d(width, 2**k) for k in range(layers)]
    return nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, width, 8, 8),
        nn.Sequential(*blocks),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class Modern(nn.Module):
    """A ConvNeXt block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.back(nn.functional.gelu(self.wide(y))).permute(0, 3, 1, 2)


def convnext(width: int = 64) -> nn.Module:
    first = nn.Sequential(*[Modern(width) for _ in range(2)])
    second = nn.Sequential(*[Modern(2 * width) for _ in range(3)])
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4),
        first,
        nn.Conv2d(width, 2 * width, 2, 2),
        second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def perceptron(width: int = 1024, layers: int = 4) -> nn.Module:
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(768, width), *hidden, nn.Linear(width, 10))


class Coder(nn.Module):
    """An autoencoder of images: convolutions down and up again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.GELU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GELU())
        self.up = nn.Sequential(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(width, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def next_token(model: nn.Module, batch: object) -> Tensor:
    outputs = model(batch.inputs)  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), batch.inputs[:, 1:].flatten())  # type: ignore[attr-defined]


def rebuilt(model: nn.Module, batch: object) -> Tensor:
    return nn.functional.mse_loss(model(batch.inputs), batch.inputs)  # type: ignore[attr-defined]


def job(model: object, data: object, batch: int, **more: object) -> delest.Job:
    """Forty steps: one epoch, evaluated once at its end."""
    return delest.Job(
        model=model,
        data=data,
        batch_size=batch,
        recipe=delest.Recipe(epochs=1, precision="fp32", memory_format="contiguous"),
        split=delest.Split(train=1 - HELD_BACK, validation=0.1, selection=0.05, test=0.1),
        **more,
    )


def mlp() -> delest.Job:
    return job(perceptron, images(16, 256), 256)


def cnn() -> delest.Job:
    return job(lambda: plain_cnn(widths=[32, 64], hidden=128, classes=10, side=32), images(32, 64), 64)


def resnet18() -> delest.Job:
    return job(lambda: resnet(blocks=[2, 2, 2, 2], bottleneck=False, classes=10), images(64, 16), 16)


def mobile() -> delest.Job:
    return job(lambda: mobilenet(classes=10), images(64, 16), 16)


def dense() -> delest.Job:
    return job(lambda: densenet(blocks=[3, 3, 3], growth=16, classes=10), images(48, 16), 16)


def modern() -> delest.Job:
    return job(convnext, images(96, 16), 16)


def vit() -> delest.Job:
    return job(Vision, images(64, 32), 32)


def encoder() -> delest.Job:
    return job(Text, tokens(128, 16), 16)


def language() -> delest.Job:
    return job(lambda: Text(causal=True), tokens(128, 8), 8, step=next_token)


def lstm() -> delest.Job:
    return job(Recurrent, tokens(96, 32), 32)


def waves() -> delest.Job:
    return job(dilated, images(64, 32), 32)


def coder() -> delest.Job:
    return job(Coder, images(96, 16), 16, step=rebuilt)
