"""Image classifiers of published measurements, with the dimensions of their papers; weights are random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def _unit(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Convolution, batch normalisation and an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class _Residual(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 where `expansion` is 4, around a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, into: int, width: int, out: int, stride: int, groups: int, bottleneck: bool):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        if bottleneck:
            self.branch = nn.Sequential(
                _unit(into, width, 1, act=relu), _unit(width, width, 3, stride, groups, act=relu), _unit(width, out, 1)
            )
        else:
            self.branch = nn.Sequential(_unit(into, width, 3, stride, act=relu), _unit(width, out, 3))
        self.shortcut = _unit(into, out, 1, stride) if stride > 1 or into != out else nn.Identity()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet, wide ResNet and ResNeXt on images [B, 3, H, W]; gives [B, 1000]."""

    def __init__(self, depths: Sequence[int], bottleneck: bool = True, groups: int = 1, width_of_group: int = 64):
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 64, 7, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
        into = 64
        for stage, depth in enumerate(depths):
            base = 64 * 2**stage
            out = base * (4 if bottleneck else 1)
            width = base * width_of_group // 64 * groups if bottleneck else base
            for block in range(depth):
                layers.append(_Residual(into, width, out, 2 if stage and not block else 1, groups, bottleneck))
                into = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(into, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class _Excitation(nn.Module):
    """Squeeze and excitation with a hard sigmoid."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(functional.relu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True))
        return x * functional.hardsigmoid(scale)


class _Inverted(nn.Module):
    def __init__(self, into: int, inner: int, out: int, kernel: int, stride: int, squeeze: bool, act: nn.Module):
        super().__init__()
        layers: list[nn.Module] = [_unit(into, inner, 1, act=act)] if inner != into else []
        layers.append(_unit(inner, inner, kernel, stride, inner, act=act))
        if squeeze:
            layers.append(_Excitation(inner, math.ceil(inner / 4 / 8) * 8))
        self.branch = nn.Sequential(*layers, _unit(inner, out, 1))
        self.add = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.add else self.branch(x)


class MobileNetV3(nn.Module):
    """MobileNetV3-large (Howard et al., arXiv 1905.02244, table 1)."""

    ROWS = (  # kernel, inner channels, out channels, squeeze, hard swish, stride
        *((3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1)),
        *((5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1)),
        *(
            (3, 480, 112, 1, 1, 1),
            (3, 672, 112, 1, 1, 1),
            (5, 672, 160, 1, 1, 2),
            (5, 960, 160, 1, 1, 1),
            (5, 960, 160, 1, 1, 1),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        swish, relu = nn.Hardswish(inplace=True), nn.ReLU(inplace=True)
        layers: list[nn.Module] = [_unit(3, 16, 3, 2, act=swish)]
        into = 16
        for kernel, inner, out, squeeze, hard, stride in self.ROWS:
            layers.append(_Inverted(into, inner, out, kernel, stride, bool(squeeze), swish if hard else relu))
            into = out
        self.features = nn.Sequential(*layers, _unit(into, 960, 1, act=swish))
        self.head = nn.Sequential(nn.Linear(960, 1280), swish, nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class _ChannelsNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.into, self.out = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.scale * self.out(functional.gelu(self.into(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al., arXiv 2201.03545)."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ChannelsNorm(widths[0])]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage:
                layers += [_ChannelsNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [_ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean((2, 3))))


class _DenseLayer(nn.Module):
    def __init__(self, into: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(into),
            nn.ReLU(inplace=True),
            nn.Conv2d(into, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 32, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(features, 1))


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang et al., arXiv 1608.06993), growth 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 64, 7, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        width = 64
        for depth in (6, 12, 24, 16):
            self.blocks.append(nn.ModuleList(_DenseLayer(width + 32 * i) for i in range(depth)))
            width += 32 * depth
            if len(self.blocks) < 4:
                narrow = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), narrow, nn.AvgPool2d(2)))
                width //= 2
        self.norm, self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True)), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            features = [x]
            for layer in block:  # type: ignore[attr-defined]
                features.append(layer(features))
            x = torch.cat(features, 1)
            if number < 3:
                x = self.transitions[number](x)
        return self.head(self.norm(x).mean((2, 3)))


def vgg16() -> nn.Module:
    """VGG-16 without batch normalisation (Simonyan, Zisserman, arXiv 1409.1556), on 224x224 images."""
    layers: list[nn.Module] = []
    into = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(into, width, 3, padding=1), nn.ReLU(inplace=True)]
            into = width
        layers.append(nn.MaxPool2d(2))
    head: list[nn.Module] = [nn.Flatten()]
    for features, out in ((512 * 49, 4096), (4096, 4096)):
        head += [nn.Linear(features, out), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*layers, *head, nn.Linear(4096, 1000))


CONVNETS = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet34": lambda: ResNet((3, 4, 6, 3), bottleneck=False),
    "resnet50": lambda: ResNet((3, 4, 6, 3)),
    "resnet50 v1.5": lambda: ResNet((3, 4, 6, 3)),
    "resnet101": lambda: ResNet((3, 4, 23, 3)),
    "resnext50_32x4d": lambda: ResNet((3, 4, 6, 3), groups=32, width_of_group=4),
    "wide_resnet50_2": lambda: ResNet((3, 4, 6, 3), width_of_group=128),
    "mobilenetv3_large_100": MobileNetV3,
    "convnext_tiny": lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": lambda: ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": lambda: ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536)),
    "densenet121": DenseNet121,
    "vgg16": vgg16,
}
