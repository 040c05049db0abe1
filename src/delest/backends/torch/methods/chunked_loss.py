"""Give logits that are not computed in place of the last layer's, and compute them chunk by chunk inside cross-entropy.

Whatever only moves their rows about is remembered and done to what enters the layer; whatever asks for their values is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from delest import errors
from delest.backends.torch.methods.blocks import Forward, blocks_named
from delest.backends.torch.methods.linear_cross_entropy import LinearCrossEntropy, Settings

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` where the module is no plain `nn.Linear`."""
    name, parts = config["module"], config["parts"]
    (module,) = blocks_named(training.model, [name], "chunked_loss").values()
    faults = []
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        faults.append(
            f"chunked_loss: the module {name!r} is a {type(module).__name__}, and only an nn.Linear's logits can be left out."
        )
    if module._forward_hooks:
        faults.append(f"chunked_loss: the module {name!r} has forward hooks, which would see no logits: remove them.")
    if parts < 2:
        faults.append(f"chunked_loss: parts is {parts}, which divides nothing: give 2 or more.")
    if faults:
        raise errors.BadInput(faults)
    assert isinstance(module, nn.Linear)
    module.forward = Head(name, module, parts)  # type: ignore[method-assign]
    training.evaluate_in_parts(parts)


class Head(Forward):
    """The last layer's forward, which computes nothing where gradients are computed in training mode."""

    def __init__(self, name: str, module: nn.Linear, parts: int):
        super().__init__(module)
        self.name, self.linear, self.parts = name, module, parts

    def __call__(self, input: Tensor) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(input)
        enabled = torch.is_autocast_enabled(input.device.type)
        return Logits(self, input, torch.get_autocast_dtype(input.device.type) if enabled else input.dtype)


@dataclass(frozen=True, eq=False)
class Logits:
    """Stands for `linear(hidden)`: hidden is [..., D], the logits [..., V], or [B, V, ...] where `classes_second`."""

    head: Head
    hidden: Tensor
    dtype: torch.dtype
    classes_second: bool = False

    @property
    def shape(self) -> torch.Size:
        *rows, _ = self.hidden.shape
        classes = self.head.linear.weight.shape[0]
        return torch.Size([rows[0], classes, *rows[1:]] if self.classes_second else [*rows, classes])

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    requires_grad = True
    is_sparse = is_nested = False

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    # What moves rows about, or says in which type

    def float(self) -> Logits:
        return replace(self, dtype=torch.float32)

    def double(self) -> Logits:
        return replace(self, dtype=torch.float64)

    def to(self, *given: Any, **named: Any) -> Logits:
        dtype = named.get("dtype", given[0] if given else None)
        if not isinstance(dtype, torch.dtype):  # another device
            raise self._refused("to")
        return replace(self, dtype=dtype)

    def contiguous(self) -> Logits:
        return self

    def view(self, *shape: Any) -> Logits:
        return self._reshaped("view", shape)

    def reshape(self, *shape: Any) -> Logits:
        return self._reshaped("reshape", shape)

    def _reshaped(self, name: str, shape: tuple[Any, ...]) -> Logits:
        sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
        classes = self.shape[-1]
        known = torch.Size([size for size in sizes[:-1] if size != -1]).numel()
        last = sizes[-1] if sizes[-1] != -1 else self.numel() // max(1, known)
        if self.classes_second or last != classes:
            raise self._refused(name)
        return replace(self, hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Logits:
        if self.classes_second or end_dim % self.ndim == self.ndim - 1:
            raise self._refused("flatten")
        return replace(self, hidden=self.hidden.flatten(start_dim, end_dim))

    def transpose(self, dim0: int, dim1: int) -> Logits:
        if self.ndim != 3 or {dim0 % 3, dim1 % 3} != {1, 2}:
            raise self._refused("transpose")
        return replace(self, classes_second=not self.classes_second)

    def permute(self, *dims: Any) -> Logits:
        order = tuple(dims[0]) if len(dims) == 1 else dims
        if self.ndim != 3 or tuple(dim % 3 for dim in order) != (0, 2, 1):
            raise self._refused("permute")
        return self.transpose(1, 2)

    @property
    def mT(self) -> Logits:
        return self.transpose(-2, -1)

    def __getitem__(self, index: Any) -> Logits:
        given = index if isinstance(index, tuple) else (index,)
        whole = slice(None)
        if self.classes_second or any(one is None for one in given):
            raise self._refused("[...]")
        if Ellipsis in [one for one in given if not isinstance(one, Tensor)]:
            at = next(i for i, one in enumerate(given) if one is Ellipsis)
            given = (*given[:at], *[whole] * (self.ndim - len(given) + 1), *given[at + 1 :])
        masks = sum(one.ndim - 1 for one in given if isinstance(one, Tensor) and one.dtype == torch.bool)
        if len(given) + masks >= self.ndim:
            if not isinstance(given[-1], slice) or given[-1] != whole:
                raise self._refused("[...]")
            given = given[:-1]
        return replace(self, hidden=self.hidden[given]) if given else self

    # All else

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        logits = next(one for one in tree_leaves((args, kwargs)) if isinstance(one, Logits))
        if func is F.cross_entropy and args and args[0] is logits:
            return _cross_entropy(logits, *args[1:], **kwargs)
        if name in _MOVES and args and args[0] is logits:
            return getattr(logits, name)(*args[1:], **kwargs)
        raise logits._refused(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refused(name)

    def _refused(self, what: str) -> errors.BadInput:
        return errors.BadInput(
            f"chunked_loss: the logits of {self.head.name!r} are asked for {what!r} in training, so that they are needed whole: only "
            "cross_entropy may use them, after slicing or reshaping of their rows. Plan without chunked_loss, or take that to evaluation."
        )


_MOVES = ("flatten", "reshape", "transpose", "permute", "numel")


def _operator(name: str) -> Callable[..., Any]:
    def refuse(self: Logits, *others: Any) -> Any:
        raise self._refused(name)

    return refuse


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "neg", "abs", "lt", "gt", "le", "ge", "iter", "float"):
    for _side in ("", "r") if _name in ("add", "sub", "mul", "truediv", "pow", "matmul") else ("",):
        setattr(Logits, f"__{_side}{_name}__", _operator(_name))


def _cross_entropy(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As torch.nn.functional.cross_entropy, with classes as targets and a sum or mean of them.

    Raises `BadInput` for other targets and reductions.
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        raise errors.BadInput(
            f"chunked_loss: cross_entropy with reduction={reduction!r} (or size_average, reduce) has no chunked form: take 'mean' or 'sum'."
        )
    hidden = logits.hidden
    if target.is_floating_point():
        raise errors.BadInput("chunked_loss: cross_entropy with probabilities as targets has no chunked form: give classes.")
    if hidden.ndim > 2 and not logits.classes_second:
        raise errors.BadInput(
            f"chunked_loss: cross_entropy takes classes on the second axis, and logits of shape {tuple(logits.shape)} have them on the last: "
            "flatten(0, 1) both logits and targets, or transpose(1, 2) the logits."
        )
    if target.shape != hidden.shape[:-1]:
        raise errors.BadInput(
            f"chunked_loss: targets of shape {tuple(target.shape)} do not go with logits of shape {tuple(logits.shape)}."
        )
    head = logits.head.linear
    settings = Settings(logits.head.parts, logits.dtype, weight, ignore_index, reduction == "mean", label_smoothing)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return LinearCrossEntropy.apply(settings, rows, head.weight, head.bias, target.reshape(-1))
