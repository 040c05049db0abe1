"""Optimizers of published measurements that torch does not have: what they keep and the temporaries of their steps."""

from __future__ import annotations

import torch

BLOCK = 2048  # entries that share one scale in bitsandbytes' 8-bit states
SMALLEST = 4096  # entries below which a state stays in fp32 (bitsandbytes' min_8bit_size)


class PlainAdamW(torch.optim.Optimizer):
    """transformers' own AdamW: a loop over parameters with one temporary, decay after the update."""

    def __init__(self, parameters, lr: float = 5e-5):  # type: ignore[no-untyped-def]
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(1e-8), value=-group["lr"])


class QuantizedAdamW(torch.optim.Optimizer):
    """AdamW with states of `bits` bits and one fp32 scale a block, updated by one kernel without temporaries.

    bits=8, block 2048 is bitsandbytes' (Dettmers et al., arXiv 2110.02861); torchao's are 8 bits at block 256 and 4 bits at
    block 128.
    """

    def __init__(self, parameters, lr: float = 1e-3, bits: int = 8, block: int = BLOCK):  # type: ignore[no-untyped-def]
        super().__init__(parameters, {"lr": lr, "bits": bits, "block": block})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    for name in ("first", "second"):
                        self._allocate(state, name, parameter, group)
                # Stands for the kernel: it reads gradient and states, and changes the states and the parameter.
                torch._foreach_mul_([*state.values(), parameter], 1)
                parameter.sub_(parameter.grad, alpha=group["lr"])

    @staticmethod
    def _allocate(state, name, parameter, group) -> None:  # type: ignore[no-untyped-def]
        count = parameter.numel()
        if count < SMALLEST:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            return
        state[name] = torch.zeros(count * group["bits"] // 8, dtype=torch.uint8)
        state[f"{name}_scale"] = torch.zeros(-(-count // group["block"]))


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive Adam (You et al., arXiv 1904.00962), as one kernel that needs an update for each parameter."""

    def __init__(self, parameters, lr: float = 1e-3):  # type: ignore[no-untyped-def]
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            moments = [self.state[parameter] for parameter in group["params"]]
            gradients = [parameter.grad for parameter in group["params"]]
            torch._foreach_lerp_([one["exp_avg"] for one in moments], gradients, 0.1)
            torch._foreach_addcmul_([one["exp_avg_sq"] for one in moments], gradients, gradients, 0.001)
            torch._foreach_addcdiv_(
                group["params"], [one["exp_avg"] for one in moments], [one["exp_avg_sq"] for one in moments], -group["lr"]
            )
