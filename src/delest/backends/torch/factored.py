"""AdamW's update without a first moment, its second moment kept as the means of rows and of columns.

Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv 1804.04235: factored second moment
(section 3), no momentum (section 4), update clipping (section 6), a decay of 1 - t^-0.8 (section 7.2); its relative step sizes are left
out. torch.optim.Adafactor does not serve: it makes an update as large as the tensor, and has relative step sizes always.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from delest.backends.torch.piecewise import PiecewiseOptimizer, counter, flat, laid_out_like, memory_order, pieces

_DECAY = -0.8
_LEAST_SQUARE = 1e-30  # added to each squared gradient
_MOST = 1.0  # root mean square of an update, before the learning rate


class FactoredAdamW(PiecewiseOptimizer):
    """Adafactor with the given learning rate and decoupled weight decay.

    What has more than two dimensions is taken for a matrix of its outermost dimension in memory (a convolution's output channels) by all
    others, dimensions of 1 aside; vectors keep their second moment whole, and are updated in one piece.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 1e-2):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def zero(self, parameter: Tensor) -> dict[str, Any]:
        rows, dtype = _rows(parameter), torch.promote_types(parameter.dtype, torch.float32)
        state: dict[str, Any] = {"step": counter(parameter)}
        if rows is None:
            return {**state, "squares": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)}
        columns = parameter.numel() // max(1, rows)
        made = {name: parameter.new_zeros(count, dtype=dtype) for name, count in (("row", rows), ("column", columns))}
        return {**state, **made}

    def take_over(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The second moment's means, without Adam's bias."""
        mine = self.state[parameter] = self.zero(parameter)
        mine["step"].copy_(torch.as_tensor(state["step"]))
        moment = flat(laid_out_like(state["exp_avg_sq"], parameter))
        unbiased = 1 / (1 - group["betas"][1] ** float(mine["step"]))
        if "squares" in mine:
            flat(mine["squares"]).copy_(moment).mul_(unbiased)
            return
        whole = moment.view(len(mine["row"]), -1)
        mine["row"].copy_(whole.mean(1)).mul_(unbiased)
        mine["column"].copy_(whole.mean(0)).mul_(unbiased)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "squares" in state:
            _update_vector(parameter, gradient, state, group)
        elif len(parameter):
            rows = len(state["row"])
            _update_matrix(parameter.view(rows, -1), gradient.view(rows, -1), state, group)


def _rows(parameter: Tensor) -> int | None:
    """Of the matrix that a parameter is taken for; None for a vector."""
    sizes = [parameter.shape[dimension] for dimension in memory_order(parameter) if parameter.shape[dimension] != 1]
    return sizes[0] if len(sizes) > 1 else None


def _new_share(state: dict[str, Any]) -> Tensor:
    """Of the second moment, that the newest gradient makes: 1 in the first step."""
    return state["step"].double().pow(_DECAY).to(state["row" if "row" in state else "squares"].dtype)


def _update_vector(vector: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    squares = flat(state["squares"])
    new = gradient.to(squares.dtype)
    squares.lerp_(new.square().add_(_LEAST_SQUARE), _new_share(state))
    found = new * squares.rsqrt()
    vector.mul_(1 - group["lr"] * group["weight_decay"])
    vector.sub_(found.mul_(group["lr"] / _excess(found.square().mean())))


def _update_matrix(matrix: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Three passes over the gradient's rows: its means, the update's size, the update."""
    (rows, columns), (row, column) = matrix.shape, (state["row"], state["column"])
    ranges = [slice(piece.start // columns, piece.stop // columns) for piece in pieces(matrix.numel(), columns)]
    room = row.new_empty((ranges[0].stop, columns))
    share = _new_share(state)
    mean = torch.zeros_like(column)
    for piece in ranges:
        squares = _squared(gradient[piece], room)
        row[piece].lerp_(squares.mean(1).add_(_LEAST_SQUARE), share)
        mean.add_(squares.sum(0), alpha=1 / rows)
    column.lerp_(mean.add_(_LEAST_SQUARE), share)
    # The second moment is row * column / mean of row.
    by_row, by_column = (row / row.mean()).clamp_(min=_LEAST_SQUARE).reciprocal_(), column.reciprocal()
    total = torch.zeros_like(share)
    for piece in ranges:
        total.add_(torch.dot(_squared(gradient[piece], room) @ by_column, by_row[piece]))
    by_row.sqrt_().mul_(group["lr"] / _excess(total / matrix.numel()))
    by_column.sqrt_()
    for piece in ranges:
        found = room[: piece.stop - piece.start].copy_(gradient[piece]).mul_(by_column)
        matrix[piece].mul_(1 - group["lr"] * group["weight_decay"]).sub_(found.mul_(by_row[piece].unsqueeze(1)))


def _squared(gradient: Tensor, room: Tensor) -> Tensor:
    found = room[: len(gradient)].copy_(gradient)
    return found.square_()


def _excess(mean_square: Tensor) -> Tensor:
    """How many times an update of that mean square is larger than it may be; 1 where it is not."""
    return mean_square.sqrt().div_(_MOST).clamp_(min=1.0)
