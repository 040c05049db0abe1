"""The networks of the zoo; each function returns one with random weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def pretrained(*, architecture: str, config: str, **settings: Any) -> nn.Module:
    """A model of transformers with random weights, from the named config class with `settings`."""
    import transformers

    return getattr(transformers, architecture)(getattr(transformers, config)(**settings))


def mlp(*, features: int, widths: list[int], classes: int) -> nn.Module:
    sizes = [features, *widths]
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def plain_cnn(*, widths: list[int], hidden: int, classes: int, side: int, channels: int = 3) -> nn.Module:
    """Convolutions of 3x3 with ReLU and pooling by two, then two linear layers."""
    layers: list[nn.Module] = []
    for inner, outer in zip([channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    flat = widths[-1] * (side >> len(widths)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes))


def _norm_conv(inner: int, outer: int, side: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inner, outer, side, stride, side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outer)]


class Residual(nn.Module):
    """Adds its input, through `shortcut`, to what `body` makes of it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, last

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.body(inputs) + self.shortcut(inputs))


def resnet(*, blocks: list[int], bottleneck: bool, classes: int, width: int = 64, layout: str = "contiguous") -> nn.Module:
    """ResNet-18 is [2, 2, 2, 2] of plain blocks, ResNet-50 [3, 4, 6, 3] of bottlenecks (He et al., 2015)."""
    layers: list[nn.Module] = [*_norm_conv(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inner = width
    for stage, count in enumerate(blocks):
        middle = width << stage
        outer = 4 * middle if bottleneck else middle
        for block in range(count):
            stride = 2 if stage and not block else 1
            body = [*_norm_conv(inner, middle, 1 if bottleneck else 3, 1 if bottleneck else stride), nn.ReLU(inplace=True)]
            body += _norm_conv(middle, middle, 3, stride if bottleneck else 1)
            if bottleneck:
                body += [nn.ReLU(inplace=True), *_norm_conv(middle, outer, 1)]
            same = stride == 1 and inner == outer
            shortcut = nn.Identity() if same else nn.Sequential(*_norm_conv(inner, outer, 1, stride))
            layers.append(Residual(nn.Sequential(*body), shortcut, nn.ReLU(inplace=True)))
            inner = outer
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))
    if layout == "channels_last":
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model


def mobilenet(*, classes: int, multiplier: float = 1.0) -> nn.Module:
    """Inverted residuals with depthwise convolutions, as MobileNetV2 (Sandler et al., 2018)."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    inner = int(32 * multiplier)
    layers: list[nn.Module] = [*_norm_conv(3, inner, 3, 2), nn.ReLU6(inplace=True)]
    for expansion, channels, count, first in stages:
        outer = int(channels * multiplier)
        for block in range(count):
            middle, stride = inner * expansion, first if not block else 1
            body = [*_norm_conv(inner, middle, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
            body += [*_norm_conv(middle, middle, 3, stride, middle), nn.ReLU6(inplace=True), *_norm_conv(middle, outer, 1)]
            same = stride == 1 and inner == outer
            layers.append(Residual(nn.Sequential(*body), nn.Identity(), nn.Identity()) if same else nn.Sequential(*body))
            inner = outer
    layers += [*_norm_conv(inner, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, classes))


class UNet(nn.Module):
    """Halves and doubles the image `depth` times, with connections across (Ronneberger et al., 2015)."""

    def __init__(self, *, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_double(inner, outer) for inner, outer in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * outer, outer, 2, 2) for outer in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_double(2 * outer, outer) for outer in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        kept = []
        for level in self.down[:-1]:
            inputs = level(inputs)
            kept.append(inputs)
            inputs = functional.max_pool2d(inputs, 2)
        inputs = self.down[-1](inputs)
        for up, merge in zip(self.up, self.merge, strict=True):
            inputs = merge(torch.cat([kept.pop(), up(inputs)], 1))
        return self.last(inputs)


def _double(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(*_norm_conv(inner, outer, 3), nn.ReLU(True), *_norm_conv(outer, outer, 3), nn.ReLU(True))


def unet(**settings: Any) -> nn.Module:
    return UNet(**settings)


class Experts(nn.Module):
    """Every expert computes every token; all but the `chosen` best are weighted with zero, so that no shape depends on data."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(width, experts, bias=False)
        self.inner = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.outer = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.router(tokens).softmax(-1)
        best, index = scores.topk(self.chosen, -1)
        gates = torch.zeros_like(scores).scatter(-1, index, best / best.sum(-1, keepdim=True))
        hidden = functional.gelu(torch.einsum("bld,edh->eblh", tokens, self.inner))
        return torch.einsum("eblh,ehd,ble->bld", hidden, self.outer, gates)


class Language(nn.Module):
    """Tokens to scores of the next one through `layers`, each of which keeps [B, length, width]."""

    def __init__(self, vocabulary: int, width: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(vocabulary, width), nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        for layer in self.layers:
            states = layer(states)
        return self.head(self.norm(states)).transpose(1, 2)


def mixture(*, vocabulary: int, width: int, heads: int, hidden: int, experts: int, chosen: int, layers: int) -> nn.Module:
    """Encoder layers of attention, each followed by a mixture of experts."""
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack.append(nn.TransformerEncoderLayer(width, heads, width, 0.0, batch_first=True, norm_first=True))
        stack.append(Residual(Experts(width, hidden, experts, chosen), nn.Identity(), nn.LayerNorm(width)))
    return Language(vocabulary, width, stack)


class First(nn.Module):
    """The first of what a recurrent network returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)[0]


def recurrent(*, cell: str, vocabulary: int, width: int, layers: int, dropout: float = 0.0) -> nn.Module:
    """A language model; `cell` is LSTM or GRU."""
    return Language(vocabulary, width, [First(getattr(nn, cell)(width, width, layers, batch_first=True, dropout=dropout))])


class Tagger(nn.Module):
    """A recurrent network in both directions over signals [B, length, features], and a linear layer on its mean."""

    def __init__(self, *, features: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(features, width, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrent(inputs)[0].mean(1))


def tagger(**settings: Any) -> nn.Module:
    return Tagger(**settings)


class Recommender(nn.Module):
    """A table of vectors with sparse gradients for each column, summed over its entries, beside numbers; then an MLP."""

    def __init__(self, *, cardinalities: list[int], width: int, numbers: int, hidden: list[int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(cardinality, width, sparse=True) for cardinality in cardinalities)
        self.top = mlp(features=width * len(cardinalities) + numbers, widths=hidden, classes=1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        vectors = [table(categories[:, column]).sum(1) for column, table in enumerate(self.tables)]
        return self.top(torch.cat([*vectors, numbers], 1)).squeeze(1)


def recommender(**settings: Any) -> nn.Module:
    return Recommender(**settings)


class Dense(nn.Module):
    """Appends what `body` makes of its input to it (Huang et al., 2016)."""

    def __init__(self, inner: int, growth: int) -> None:
        super().__init__()
        before, middle = [nn.BatchNorm2d(inner), nn.ReLU()], [nn.BatchNorm2d(4 * growth), nn.ReLU()]
        narrow, wide = nn.Conv2d(inner, 4 * growth, 1, bias=False), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.body = nn.Sequential(*before, narrow, *middle, wide)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.body(inputs)], 1)


def densenet(*, blocks: list[int], growth: int, classes: int) -> nn.Module:
    channels = 2 * growth
    layers: list[nn.Module] = [*_norm_conv(3, channels, 3, 2), nn.ReLU()]
    for stage, count in enumerate(blocks):
        if stage:
            layers += [*_norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        layers += [Dense(channels + growth * block, growth) for block in range(count)]
        channels += growth * count
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def video(*, widths: list[int], classes: int) -> nn.Module:
    """Convolutions in space and time, instance norms, strides of two."""
    layers: list[nn.Module] = []
    for inner, outer in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv3d(inner, outer, 3, (1, 2, 2), 1), nn.InstanceNorm3d(outer, affine=True), nn.SiLU()]
        layers += [nn.Conv3d(outer, outer, 3, 1, 1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class Gated(nn.Module):
    """One dilated gated layer of WaveNet (van den Oord et al., 2016) with its residual; signals [B, width, length]."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.filter = nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation))
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        signal, gate = self.filter(inputs).chunk(2, 1)
        return inputs + self.mix(signal.tanh() * gate.sigmoid())


def wavenet(*, width: int, layers: int) -> nn.Module:
    stack = [Gated(width, 1 << (layer % 8)) for layer in range(layers)]
    return nn.Sequential(nn.Conv1d(1, width, 1), *stack, nn.ReLU(), nn.Conv1d(width, 1, 1))


def autoencoder(*, widths: list[int]) -> nn.Module:
    """Strided convolutions down and transposed ones up again, with group norms."""
    layers: list[nn.Module] = []
    for inner, outer in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(inner, outer, 4, 2, 1), nn.GroupNorm(8, outer), nn.GELU()]
    back = widths[::-1]
    for inner, outer in zip(back, [*back[1:], 3], strict=True):
        layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1), nn.ELU()]
    return nn.Sequential(*layers, nn.Conv2d(3, 3, 3, padding=1))


class Translator(nn.Module):
    """torch's own transformer with a causal mask and one table of vectors for source, target and scores."""

    def __init__(self, *, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, heads, layers, layers, 4 * width, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        states = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return (states @ self.embedding.weight.T).transpose(1, 2)


def translator(**settings: Any) -> nn.Module:
    return Translator(**settings)


class AllLayers(nn.Module):
    """One small layer of each kind that the zoo has, so that a process which has trained it has loaded what they load."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.flat = nn.Sequential(*_norm_conv(3, 16, 3), nn.ReLU(), *_norm_conv(16, 16, 3, 2, 16), nn.MaxPool2d(2), nn.GELU())
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.recurrent = nn.ModuleList([nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)])
        self.table, self.head = nn.Embedding(8, 16, sparse=sparse), nn.Linear(16, 2)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        states = self.attention(self.up(self.flat(pixels)).flatten(2).transpose(1, 2)) + self.table(tokens).mean(
            1, keepdim=True
        )
        for layer in self.recurrent:
            states = layer(states)[0]
        return self.head(states.mean(1))


def all_layers(*, sparse: bool) -> nn.Module:
    return AllLayers(sparse).train()
