import time

import torch

from delest.backends.torch import costs
from delest.hardware import slow_kernels


def test_every_kernel_has_a_rate():
    rates = dict(slow_kernels.time_kernels(torch, time.perf_counter))
    assert all(0 < rate < 1e13 for rate in rates.values())
    assert rates["random.fp32"] < rates["reduction.fp32"]  # one number after another, against a sum


def test_every_kind_that_is_told_apart_has_a_kernel_and_the_other_way_round():
    named = set(slow_kernels._kernels(torch))
    assert named == {*costs._SLOW.values(), "depthwise", "softmax_across", "softmax_across_backward"}


def test_bytes_are_what_the_operator_is_counted_to_move():
    """A rate and the bytes that it is applied to must be of one measure; small operands beside the large ones do not count."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        moved = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            self.moved += costs.cost(func, args, kwargs or {}, outputs).moved_bytes
            return outputs

    for name, (kernel, moved) in slow_kernels._kernels(torch).items():
        with Counting() as counting:
            kernel()
        assert abs(counting.moved / moved - 1) < 0.02, name
