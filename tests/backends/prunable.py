"""Networks to make narrower, of kinds that differ in what belongs together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    def __init__(self, width: int = 16, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, groups=groups)
        self.outer = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 8, 8] -> [B, 5]
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 24, 1)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norm = nn.BatchNorm2d(24)
        self.narrow = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.narrow(torch.relu(self.norm(self.depth(self.widen(x))))).mean((2, 3)))


class Attention(nn.Module):
    """Queries, keys and values apart or at once, keys shared by several queries or not."""

    def __init__(self, width: int, heads: int, shared: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.fused = heads, shared, width // heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, shared * self.head_dim)
            self.v = nn.Linear(width, shared * self.head_dim)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = (layer(x).view(rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
            k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, -1)
        return self.out(mixed)


class Transformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, shared: int = 4, fused: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, width)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, shared, fused)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 40]
        x = self.embedding(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.outer(torch.relu(self.inner(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2, both: bool = False) -> None:
        super().__init__()
        self.recurrent = kind(6, 12, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(24 if both else 12, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6] -> [B, 5]
        return self.head(self.recurrent(x)[0][:, -1])


class Fixed(nn.Module):
    """Its view says how many heads there are and how wide they are; nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


IMAGES, TOKENS, SIGNALS = torch.Size((2, 3, 8, 8)), torch.Size((2, 7)), torch.Size((2, 9, 6))


def inputs(shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if shape == TOKENS:
        return torch.randint(0, 40, shape, generator=generator)
    return torch.randn(shape, generator=generator)
