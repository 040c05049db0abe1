"""Transformers of published measurements, written as those who measured had them, with random weights.

What a step keeps depends on how a model is written, so attention, position encodings and low-rank updates follow the code that was
measured: transformers' BERT and Llama, timm's vision transformers, lit-gpt's GPT with LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class _VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, *, gated: bool, fused: bool, scaled: bool):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.into, self.out = nn.Linear(width, (2 if gated else 1) * hidden), nn.Linear(hidden, width)
        self.scales = nn.ParameterList(torch.ones(width) for _ in range(2 if scaled else 0))
        self.heads, self.gated, self.fused = heads, gated, fused

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._scaled(self._attend(self.norm_1(x)), 0)
        return x + self._scaled(self._mix(self.norm_2(x)), 1)

    def _scaled(self, x: Tensor, which: int) -> Tensor:
        return x * self.scales[which] if len(self.scales) else x

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.project(out.transpose(1, 2).reshape(batch, tokens, width))

    def _mix(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.out(functional.gelu(self.into(x)))
        gate, value = self.into(x).chunk(2, -1)
        return self.out(functional.silu(gate) * value)


class VisionTransformer(nn.Module):
    """timm's vision transformer (Dosovitskiy et al., arXiv 2010.11929); images [B, 3, S, S] to [B, classes]."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        *,
        image: int,
        patch: int,
        classes: int,
        gated: bool = False,
        fused: bool = True,
        scaled: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            _VisionBlock(width, heads, hidden, gated=gated, fused=fused, scaled=scaled) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True, preserve_rng_state=False) if self.checkpointed else block(x)
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """Dimensions of one of lit-gpt's models."""

    layers: int
    width: int
    heads: int
    groups: int  # of heads that share keys and values
    hidden: int
    vocabulary: int
    rotated: float = 1.0  # share of a head's features that positions turn
    parallel: bool = False  # attention and the perceptron read the same input
    shared_norm: bool = False
    gated: bool = False  # SwiGLU with RMSNorm and no biases, or GELU with LayerNorm and biases
    head_bias: bool = False
    approximate: str = "none"  # GELU's form
    rank: int = 0  # of LoRA on queries and values; 0 trains every weight


class _RootNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * wide).to(x.dtype)


class _LowRankQKV(nn.Module):
    """The joint projection with an update of rank r for queries and values: the shape of lit-gpt's LoRAQKVLinear.

    Rows of the update that belong to keys are zeros, scattered into a tensor of the projection's own size.
    """

    def __init__(self, shape: GPTShape, bias: bool):
        super().__init__()
        size = shape.width // shape.heads
        self.query, self.shared = shape.width, size * shape.groups
        self.linear = nn.Linear(shape.width, self.query + 2 * self.shared, bias=bias)
        self.rank = shape.rank
        if shape.rank:
            self.lora_a = nn.Parameter(torch.zeros(2 * shape.rank, shape.width))
            self.lora_b = nn.Parameter(torch.zeros(self.query + self.shared, shape.rank))

    def forward(self, x: Tensor) -> Tensor:
        plain = self.linear(x)
        if not self.rank:
            return plain
        low = functional.linear(functional.dropout(x, 0.05), self.lora_a).transpose(-2, -1)
        full = functional.conv1d(low, self.lora_b.unsqueeze(-1), groups=2).transpose(-2, -1)
        return plain + self._padded(full) * (16 / self.rank)

    def _padded(self, update: Tensor) -> Tensor:
        """[B, T, queries and values] to [B, T, queries, keys and values]."""
        update = update.transpose(0, 1)
        keys = torch.arange(self.query + self.shared, self.query + 2 * self.shared)
        rows = torch.cat([torch.arange(self.query), keys])
        width = self.linear.out_features
        whole = update.new_zeros((*update.shape[:-1], width)).view(-1, width)
        whole = whole.index_copy(1, rows, update.reshape(-1, update.shape[-1]))
        return whole.view(*update.shape[:-1], width).transpose(0, 1)


class _GPTBlock(nn.Module):
    def __init__(self, shape: GPTShape):
        super().__init__()
        norm, bias = (_RootNorm if shape.gated else nn.LayerNorm), not shape.gated
        self.norm_1 = norm(shape.width)
        self.norm_2 = None if shape.shared_norm else norm(shape.width)
        self.qkv = _LowRankQKV(shape, bias)
        self.project = nn.Linear(shape.width, shape.width, bias=bias)
        self.into = nn.ModuleList(nn.Linear(shape.width, shape.hidden, bias=bias) for _ in range(2 if shape.gated else 1))
        self.out = nn.Linear(shape.hidden, shape.width, bias=bias)
        self.shape = shape

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first = self.norm_1(x)
        attended = self._attend(first, cos, sin)
        if self.shape.parallel:
            return x + attended + self._mix(first if self.norm_2 is None else self.norm_2(x))
        x = x + attended
        return x + self._mix(self.norm_2(x))  # type: ignore[misc]

    def _mix(self, x: Tensor) -> Tensor:
        if self.shape.gated:
            return self.out(functional.silu(self.into[0](x)) * self.into[1](x))
        return self.out(functional.gelu(self.into[0](x), approximate=self.shape.approximate))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        size, each = width // self.shape.heads, self.shape.heads // self.shape.groups
        qkv = self.qkv(x).view(batch, tokens, self.shape.groups, each + 2, size).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((each, 1, 1), dim=2)
        if self.shape.groups != 1:
            k, v = (one.expand(batch, self.shape.groups, each, tokens, size) for one in (k, v))
        q, k, v = (one.reshape(batch, -1, tokens, size) for one in (q, k, v))
        turned = cos.shape[-1]
        q, k = (torch.cat((_turn(one[..., :turned], cos, sin), one[..., turned:]), -1) for one in (q, k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(y.transpose(1, 2).reshape(batch, tokens, width))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + turned * sin).type_as(x)


class GPT(nn.Module):
    """lit-gpt's model; tokens [B, T] to logits, as a list of pieces of `chunk` tokens where that is given.

    Logits are fp32 whatever the weights are: Lightning's `bf16-true` converts what a model gives
    (lightning/fabric/plugins/precision/half.py, convert_output).
    """

    def __init__(self, shape: GPTShape, tokens: int, *, chunk: int | None = None):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_GPTBlock(shape) for _ in range(shape.layers))
        self.norm = _RootNorm(shape.width) if shape.gated else nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=shape.head_bias)
        turned = int(shape.rotated * shape.width // shape.heads)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(tokens, turned), persistent=False)
        self.chunk = chunk
        if shape.rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def forward(self, tokens: Tensor) -> Tensor | list[Tensor]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.norm(x)
        if self.chunk is None:
            return self.head(x).float()
        pieces = [self.head(piece) for piece in x.split(self.chunk, 1)]
        return [piece.float() for piece in pieces]


def next_token_loss(logits: Tensor | list[Tensor], tokens: Tensor) -> Tensor:
    """Cross-entropy with the next token, in pieces of 128 tokens where the logits are."""
    if isinstance(logits, Tensor):
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    pieces = [*logits[:-1], logits[-1][:, :-1]]
    losses = [
        functional.cross_entropy(piece.reshape(-1, piece.shape[-1]), wanted.reshape(-1), reduction="none")
        for piece, wanted in zip(pieces, tokens[:, 1:].split(pieces[0].shape[1], 1), strict=True)
    ]
    return torch.cat(losses).mean()


def bert(*, task: str, checkpointed: bool = False, tokens: int = 512) -> nn.Module:
    """transformers' BERT-large with attention scores in full: `task` is classification, span or pretraining."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=512,
        num_labels=2,
        attn_implementation="eager",
    )
    kinds = {
        "classification": transformers.BertForSequenceClassification,
        "span": transformers.BertForQuestionAnswering,
        "pretraining": transformers.BertModel,
    }
    model = kinds[task](config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    return _Pretraining(model, config) if task == "pretraining" else model


class _Pretraining(nn.Module):
    """Heads of BERT that are computed where words are hidden, 20 of 128 tokens, and for the next sentence."""

    def __init__(self, body: nn.Module, config: object):
        super().__init__()
        self.body = body
        self.transform = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024))
        self.sentence = nn.Linear(1024, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.body(input_ids)
        hidden = self.transform(out.last_hidden_state[:, :20])
        words = hidden @ self.body.embeddings.word_embeddings.weight.t()  # type: ignore[union-attr, operator]
        return functional.cross_entropy(words.flatten(0, 1).float(), input_ids[:, :20].flatten()) + functional.cross_entropy(
            self.sentence(out.pooler_output), input_ids[:, 0]
        )


def llama(width: int, layers: int, heads: int, hidden: int, *, low_rank: bool) -> nn.Module:
    """transformers' Llama 2 with attention scores in full, with LoRA of rank 8 on queries and values where `low_rank`."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=hidden,
        vocab_size=32000,
        attn_implementation="eager",
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    if low_rank:
        model.requires_grad_(False)
        for layer in model.model.layers:
            for name in ("q_proj", "v_proj"):
                setattr(layer.self_attn, name, _LowRank(getattr(layer.self_attn, name)))
    return model


class _LowRank(nn.Module):
    """peft's LoRA of rank 8 beside a frozen projection."""

    def __init__(self, plain: nn.Linear, rank: int = 8):
        super().__init__()
        self.plain = plain
        self.down, self.up = nn.Linear(plain.in_features, rank, bias=False), nn.Linear(rank, plain.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.up(self.down(functional.dropout(x, 0.1))) * 2.0
