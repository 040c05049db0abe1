"""AdamW's moments in few bits, block by block.

The elements of a block share a scale, their largest magnitude, in fp32. A code c stands for

| | 8 bits, blocks of 256 | 4 bits, blocks of 128, two codes a byte |
|---|---|---|
| first moment, with its sign | scale * (c / 127)^2 | scale * (c / 7)^2 |
| second moment | scale * (c / 255)^4, c from 1 | scale * c / 16, c from 1 |

In 8 bits both maps are as dense near zero as the first source's dynamic one (section 2.2: down to about 1e-5 of a block's largest
gradient). In 4 bits the second moment has the second source's linear map without zero, by which nothing may be divided. Its first moment
has a table; the square differs from it less than the table does from the moments (the error is 12 % of normal values' size against
15 %, docs/log.md), and being closed forms all four need no search, which a processor would do element by element.

Sources: Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861; Li, Chen and Zhu, "Memory efficient
optimizers with 4-bit states", arXiv 2309.01507, whose scales by row and column are left out: they need every element twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from delest.methods.optimizer_state import BLOCKS

_LEAST_SCALE = 1e-28  # of a block of zeros; the quotient of the two must be a finite fp32


@dataclass(frozen=True)
class Coding:
    """How one moment is kept; `values` and `work` below are fp32, [blocks * block]."""

    name: str  # in an AdamW's state
    bits: int
    top: int  # the largest code
    roots: int  # how many times a value's root is taken before it is rounded

    @property
    def signed(self) -> bool:
        return self.name == "exp_avg"

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return BLOCKS[self.bits]

    @property
    def block_bytes(self) -> int:
        """Of a block's codes."""
        return self.block * self.bits // 8

    def zero(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Codes [blocks * block_bytes] and scales [blocks] of `count` zeros."""
        blocks, dtype = -(-count // self.block), torch.int8 if self.bits == 8 and self.signed else torch.uint8
        codes = torch.zeros(blocks * self.block_bytes, dtype=dtype, device=device)
        return codes, torch.zeros(blocks, dtype=torch.float32, device=device)

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor, work: Tensor) -> None:
        """Write the codes and scales of `values`, with `work` as room for as many."""
        blocks, rounded = values.view(-1, self.block), work.view(-1, self.block)
        torch.abs(blocks, out=rounded)
        scales.copy_(rounded.amax(1).clamp_min_(_LEAST_SCALE))
        rounded.mul_((self._top / scales).unsqueeze(1))
        for _ in range(self.roots):
            rounded.sqrt_()
        rounded.round_()
        if self.signed:
            rounded.copysign_(blocks)
        else:  # no code is 0, so that no update is divided by nothing
            rounded.clamp_(min=1)
        if self.bits == 8:
            codes.copy_(work)
        else:
            low, high = rounded.add_(self._offset).chunk(2, 1)
            codes.view(len(blocks), -1).copy_(low.add_(high, alpha=16))

    def decode(self, codes: Tensor, scales: Tensor, values: Tensor, work: Tensor) -> None:
        """Write into `values` what codes and scales stand for."""
        if self.bits == 8:
            values.copy_(codes)
        else:
            low, high = values.view(-1, self.block).chunk(2, 1)
            low.copy_((codes & 15).view(low.shape))
            high.copy_((codes >> 4).view(low.shape))
            values.sub_(self._offset)
        if self.signed:
            values.mul_(torch.abs(values, out=work))
        else:
            for _ in range(self.roots):
                values.square_()
        values.view(-1, self.block).mul_((scales / self._top).unsqueeze(1))

    @property
    def _offset(self) -> int:
        """From a code to what half a byte holds."""
        return 8 if self.signed else -1

    @property
    def _top(self) -> float:
        """What the largest code stands for, before the scale."""
        return float(self.top ** (2**self.roots))


CODINGS = {  # by the number of bits
    8: (Coding("exp_avg", 8, 127, 1), Coding("exp_avg_sq", 8, 255, 2)),
    4: (Coding("exp_avg", 4, 7, 1), Coding("exp_avg_sq", 4, 16, 0)),
}
