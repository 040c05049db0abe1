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
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2, both: bool = False, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.recurrent = kind(6, 12, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(24 if both else 12, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6] -> [B, 5]
        outputs, states = self.recurrent(x)
        return self.head(states[-1] if self.last else outputs[:, -1])


class Fixed(nn.Module):
    """Its view says how many heads there are and how wide they are; nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


class Tables(nn.Module):
    """Tables of vectors beside numbers as they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 16) for _ in range(2))
        self.inner, self.head = nn.Linear(2 * 16 + 6, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6] -> [B, 5]
        numbers = x.mean(1)
        columns = (10 + 5 * numbers[:, :2]).long().clamp(0, 19)
        first, second = (table(columns[:, place]) for place, table in enumerate(self.tables))
        return self.head(torch.relu(self.inner(torch.cat([first, numbers, second], 1))))


class Gated(nn.Module):
    """Weights with a norm of their own; one half of the channels is a gate for the other."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.filter, self.mix = norm(nn.Conv1d(9, 32, 3, padding=1)), norm(nn.Conv1d(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, 9, T] -> [B, 5]
        signal, gate = self.filter(x).chunk(2, 1)
        return self.head(self.mix(signal.tanh() * gate.sigmoid()).relu().mean(2))


class Experts(nn.Module):
    """Raw parameters in einsum, all experts weighted; a table that gives scores again, by its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.router = nn.Embedding(40, 16), nn.Linear(16, 3)
        self.inner, self.outer = nn.Parameter(torch.randn(3, 16, 32) / 4), nn.Parameter(torch.randn(3, 32, 16) / 6)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 40]
        x = self.embedding(tokens)
        hidden = functional.gelu(torch.einsum("bld,edh->eblh", x, self.inner))
        mixed = torch.einsum("eblh,ehd,ble->bld", hidden, self.outer, self.router(x).softmax(-1))
        return (x + mixed) @ self.embedding.weight.T


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.transformer = nn.Transformer(24, 2, 1, 1, 48, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 40]
        states = self.embedding(tokens)
        return functional.linear(self.transformer(states, states.flip(1)), self.embedding.weight)


class Biased(nn.Module):
    """Attention whose biases by position the first of them makes for all, as in T5."""

    def __init__(self, first: bool, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.n_heads, self.d_model, self.inner_dim = heads, width, width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.table = nn.Embedding(14, heads) if first else None

    def forward(self, x: Tensor, biases: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if biases is None:
            assert self.table is not None
            places = torch.arange(x.shape[1])
            biases = self.table(places[None] - places[:, None] + x.shape[1]).permute(2, 0, 1)[None]
        mixed = (q @ k.transpose(2, 3) + biases).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2)), biases


class Handing(nn.Module):
    """Two attentions with one table; two tables of words that are one tensor with a third, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.source, self.target = (nn.Embedding(40, 24) for _ in range(3))
        self.first, self.second = Biased(True), Biased(False)
        self.head, self.other = (nn.Linear(24, 40, bias=False) for _ in range(2))
        self.source.weight = self.target.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 40]
        x, y = self.source(tokens), self.target(tokens.flip(1))
        mixed, biases = self.first(x)
        return self.head((x + mixed).relu()) + self.other(y + self.second(y, biases)[0])


IMAGES, TOKENS, SIGNALS = torch.Size((2, 3, 8, 8)), torch.Size((2, 7)), torch.Size((2, 9, 6))


def inputs(shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if shape == TOKENS:
        return torch.randint(0, 40, shape, generator=generator)
    return torch.randn(shape, generator=generator)
