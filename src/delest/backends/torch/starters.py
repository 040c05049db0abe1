"""Starter models for when only data are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delest import errors
from delest.records.source import Schema


def choose(schema: Schema) -> nn.Module:
    """A small convolutional network for images, an MLP with category embeddings for tables, a causal transformer for texts, an MLP for arrays."""
    if schema.target is None:
        raise errors.BadInput("there is no target to learn: name one with --target, or give a Job with its own `step`.")
    if schema.is_image:
        channels, height, width = schema.input_shape
        if min(height, width) >= 8:
            return SmallConvNet(channels, schema.outputs, wide=min(height, width) > 64)
    if schema.is_table:
        return TableMLP(schema.number_width, [column.cardinality or 1 for column in schema.categories], schema.outputs)
    if schema.is_text:
        return CausalTransformer(schema.outputs, schema.input_shape[0])
    if len(schema.inputs) > 1:
        names = ", ".join(column.name for column in schema.inputs)
        raise errors.BadInput(f"there is no starter model for several array inputs ({names}): give a Job with a model.")
    return ArrayMLP(schema.input_shape, schema.outputs)


class SmallConvNet(nn.Module):
    """Convolutions with batch normalisation at 32, 64 and 128 channels, averaged over the image, then one linear layer.

    Input [B, C, H, W], output [B, outputs]. `wide` puts a stride-4 convolution in front of images above 64 pixels, so
    that cost does not grow with the square of the side from the start.
    """

    def __init__(self, channels: int, outputs: int, *, wide: bool = False):
        super().__init__()
        first = [_block(channels, 32, 7, 4)] if wide else [_block(channels, 32, 3, 1)]
        self.features = nn.Sequential(
            *first,
            _block(32, 32, 3, 2),
            _block(32, 64, 3, 1),
            _block(64, 64, 3, 2),
            _block(64, 128, 3, 1),
            _block(128, 128, 3, 2),
        )
        self.head = nn.Linear(128, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def _block(inputs: int, outputs: int, side: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class TableMLP(nn.Module):
    """Numbers and embedded categories through two hidden layers.

    `numbers` [B, D] and `categories` int64 [B, K]; output [B, outputs]. A table of a user and an item column makes it a
    recommender: the hidden layers see both embeddings, and their product besides, which is matrix factorisation.
    """

    def __init__(self, numbers: int, cardinalities: list[int], outputs: int, hidden: int = 128):
        super().__init__()
        # The usual rule of thumb for an embedding's width, a multiple of 4.
        widths = [min(32, 4 * max(1, round(1.6 * c**0.56 / 4))) for c in cardinalities]
        if len(cardinalities) == 2:
            widths = [max(widths)] * 2
        self.embeddings = nn.ModuleList(nn.Embedding(c, w) for c, w in zip(cardinalities, widths, strict=True))
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=0.1)  # torch's default of 1 drowns the numbers, which have deviation 1
        products = widths[0] if len(widths) == 2 else 0
        self.body = nn.Sequential(
            nn.Linear(numbers + sum(widths) + products, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, outputs)

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        parts = [] if numbers is None else [numbers]
        if categories is not None:
            embedded = [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
            parts.extend(embedded)
            if len(embedded) == 2:
                parts.append(embedded[0] * embedded[1])
        return self.head(self.body(torch.cat(parts, 1)))


class ArrayMLP(nn.Module):
    """A flattened array [B, ...] through two hidden layers; output [B, outputs]."""

    def __init__(self, shape: tuple[int, ...], outputs: int, hidden: int = 128):
        super().__init__()
        width = 1
        for size in shape:
            width *= size
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class CausalTransformer(nn.Module):
    """A small GPT: learnt positions, blocks of masked self-attention and a hidden layer, each normalised first, and a score for each token.

    Input ids int64 [B, T] with T up to `context`; output [B, T, tokens]. Source: Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019, section 2.3.
    """

    def __init__(self, tokens: int, context: int, *, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(context, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.hidden(self.second(x))


class _Attention(nn.Module):
    """Each place looks at those before it and itself, in H heads of D channels."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))
