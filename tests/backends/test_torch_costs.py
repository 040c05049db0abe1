import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from delest.backends.torch.costs import Cost, bytes_of, cost

F = 4  # bytes of a float


class Counting(TorchDispatchMode):
    """Keeps the cost of everything dispatched, by name of the operator."""

    def __init__(self):
        super().__init__()
        self.costs: list[tuple[str, Cost]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.costs.append((str(func), cost(func, args, kwargs or {}, outputs)))
        return outputs

    def of(self, name):
        """The costs of one operator, in order."""
        return [counted for full, counted in self.costs if full.split(".")[1] == name]


def count(run):
    """Costs of what `run` does with fake tensors."""
    with FakeTensorMode(), Counting() as counting:
        run()
    return counting


def one(run, name):
    (found,) = count(run).of(name)
    return found


def backward_of(run):
    """Costs of what `run` does and of its backward pass, whose gradient is no expanded scalar."""

    def both():
        run().square().sum().backward()

    return count(both)


def test_products_of_matrices_cost_two_flops_a_multiply_add_and_their_operands_once():
    assert one(lambda: torch.empty(3, 5) @ torch.empty(5, 7), "mm") == Cost("matmul", "fp32", 2 * 3 * 5 * 7, F * (15 + 35 + 21))
    batched = one(lambda: torch.empty(4, 3, 5) @ torch.empty(4, 5, 7), "bmm")
    assert batched == Cost("matmul", "fp32", 4 * 2 * 3 * 5 * 7, 4 * F * (15 + 35 + 21))
    with_bias = one(lambda: functional.linear(torch.empty(3, 5), torch.empty(7, 5), torch.empty(7)), "addmm")
    assert with_bias == Cost("matmul", "fp32", 2 * 3 * 5 * 7, F * (7 + 15 + 35 + 21))
    into = one(lambda: torch.baddbmm(torch.empty(4, 3, 7), torch.empty(4, 3, 5), torch.empty(4, 5, 7)), "baddbmm")
    assert into.flops == batched.flops
    assert into.moved_bytes == batched.moved_bytes + 4 * F * 21


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float64, "fp64")])
def test_the_format_is_that_of_the_operands(dtype, name):
    found = one(lambda: torch.empty(2, 2, dtype=dtype) @ torch.empty(2, 2, dtype=dtype), "mm")
    assert (found.dtype, found.moved_bytes) == (name, 12 * dtype.itemsize)
    assert one(lambda: torch.empty(2, dtype=torch.int64) + 1, "add").dtype == "int"


def convolve(groups=1, transposed=False, **settings):
    """A layer of 8 to 16 channels (16 to 8 where transposed) on 10 x 10; its kernel of 3 x 3."""
    layer = (nn.ConvTranspose2d(16, 8, 3, **settings) if transposed else nn.Conv2d(8, 16, 3, groups=groups, **settings)).train()
    inputs = torch.empty(2, 16 if transposed else 8, 10, 10, requires_grad=True)
    return layer(inputs)


def test_a_convolution_meets_its_kernel_at_every_position_of_the_output():
    found = one(convolve, "convolution")
    assert found.kind == "convolution"
    assert found.flops == 2 * 2 * 8 * 8 * (16 * 8 * 9)
    assert found.moved_bytes == F * (2 * 8 * 100 + 16 * 8 * 9 + 16 + 2 * 16 * 64)
    assert one(lambda: convolve(stride=2), "convolution").flops == 2 * 2 * 4 * 4 * (16 * 8 * 9)


def test_a_transposed_convolution_meets_its_kernel_at_every_position_of_the_inputs():
    assert one(lambda: convolve(transposed=True), "convolution").flops == 2 * 2 * 100 * (16 * 8 * 9)


@pytest.mark.parametrize(
    "settings", [{}, {"groups": 4}, {"groups": 8}, {"stride": 2}, {"transposed": True}, {"padding": 1, "groups": 2}]
)
def test_a_convolutions_backward_costs_its_forward_twice_or_once_where_inputs_want_no_gradient(settings):
    both = backward_of(lambda: convolve(**settings))
    (forward,), (backward,) = both.of("convolution"), both.of("convolution_backward")
    assert backward.flops == 2 * forward.flops
    assert backward.kind == forward.kind
    first = backward_of(lambda: nn.Conv2d(3, 4, 3)(torch.empty(1, 3, 8, 8)))
    assert first.of("convolution_backward")[0].flops == first.of("convolution")[0].flops


def test_grouped_convolutions_do_less_and_depthwise_ones_are_of_their_own_kind():
    whole, grouped, depthwise = (one(lambda g=g: convolve(groups=g), "convolution") for g in (1, 4, 8))
    assert (grouped.kind, grouped.flops) == ("convolution", whole.flops / 4)
    assert (depthwise.kind, depthwise.flops) == ("depthwise", whole.flops / 8)


def attend(causal=False, **more):
    query, key, value = (torch.empty(2, 4, length, 16, requires_grad=True) for length in (32, 32, 32))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, **more)


def test_attention_is_two_products_forward_and_five_backward_half_of_them_hidden_by_a_causal_mask():
    product = 2 * 2 * 4 * 32 * 32 * 16
    both = backward_of(attend)
    (forward,) = both.of("_scaled_dot_product_flash_attention_for_cpu")
    (backward,) = both.of("_scaled_dot_product_flash_attention_for_cpu_backward")
    assert (forward.kind, forward.flops) == ("attention", 2 * product)
    assert (backward.kind, backward.flops) == ("attention", 5 * product)
    hidden = one(lambda: attend(causal=True), "_scaled_dot_product_flash_attention_for_cpu")
    assert hidden.flops == forward.flops / 2


def test_a_recurrent_layer_passes_inputs_and_state_through_its_gates_and_twice_backward():
    def run():
        return nn.LSTM(8, 16)(torch.empty(5, 3, 8, requires_grad=True))[0]

    both = backward_of(run)
    (forward,), (backward,) = both.of("mkldnn_rnn_layer"), both.of("mkldnn_rnn_layer_backward")
    assert (forward.kind, forward.flops) == ("recurrent", 2 * 5 * 3 * 4 * 16 * (8 + 16))
    assert (backward.kind, backward.flops) == ("recurrent", 2 * forward.flops)


def test_views_and_what_only_allocates_move_nothing():
    def run():
        tensor = torch.empty(4, 6)
        tensor.t().reshape(6, 2, 2).unsqueeze(0).expand(3, 6, 2, 2)
        tensor.detach().split(2)
        torch.ops.aten._unsafe_view(tensor, [24])
        tensor.t_()

    found = count(run)
    assert len(found.costs) >= 7
    assert all(counted.moved_bytes == counted.flops == 0 for _, counted in found.costs)
    assert all(counted.kind == "view" for name, counted in found.costs if "empty" not in name)


def test_elementwise_operators_read_their_inputs_and_write_their_output():
    assert one(lambda: torch.empty(6) + torch.empty(6), "add") == Cost("memory", "fp32", 0, F * 18)
    assert one(lambda: torch.empty(6, dtype=torch.bfloat16).float(), "_to_copy").moved_bytes == 6 * (2 + 4)


def test_what_is_changed_in_place_is_read_and_written_what_is_overwritten_is_written():
    assert one(lambda: torch.empty(6).mul_(2), "mul_").moved_bytes == F * 12
    assert one(lambda: torch.empty(6).copy_(torch.empty(6)), "copy_").moved_bytes == F * 12
    assert one(lambda: torch.empty(6).zero_(), "zero_").moved_bytes == F * 6
    into = one(lambda: torch.add(torch.empty(6), torch.empty(6), out=torch.empty(6)), "add")
    assert into.moved_bytes == F * 18


def test_an_expanded_input_is_read_by_what_it_has():
    assert one(lambda: torch.empty(5, 1).expand(5, 100) + torch.empty(5, 100), "add").moved_bytes == F * (5 + 500 + 500)
    with FakeTensorMode():
        assert bytes_of(torch.empty(1).expand(10, 10)) == F
        assert bytes_of(torch.empty(4, 6).t()) == F * 24
        assert bytes_of(torch.empty(0, 3)) == 0


def test_embeddings_read_rows_and_their_gradient_clears_the_table():
    def run():
        return nn.Embedding(1000, 8)(torch.zeros(4, 5, dtype=torch.int64))

    both = backward_of(run)
    assert both.of("embedding")[0].moved_bytes == 2 * F * 20 * 8 + 20 * 8
    assert both.of("embedding_dense_backward")[0].moved_bytes == F * 8000 + 3 * F * 20 * 8 + 20 * 8


def test_a_bag_reads_a_row_for_each_index():
    bag = one(lambda: nn.EmbeddingBag(1000, 8, mode="sum")(torch.zeros(4, 5, dtype=torch.int64)), "_embedding_bag")
    assert F * 20 * 8 + 20 * 8 <= bag.moved_bytes < F * 1000 * 8 / 10


def test_a_sparse_gradient_is_added_to_its_rows_only():
    def run():
        weight = torch.empty(1000, 8)
        rows = torch.sparse_coo_tensor(
            torch.zeros(1, 5, dtype=torch.int64), torch.empty(5, 8), (1000, 8), check_invariants=False
        )
        weight.add_(rows, alpha=-0.1)

    assert one(run, "add_").moved_bytes == 3 * F * 5 * 8 + 5 * 8


def test_gathering_and_scattering_touch_what_is_picked():
    rows, numbers = F * 5 * 8, 8 * 5

    def run():
        table, index = torch.empty(1000, 8), torch.zeros(5, dtype=torch.int64)
        torch.index_select(table, 0, index)
        table[index]
        table.index_add_(0, index, torch.empty(5, 8))

    found = count(run)
    assert found.of("index_select")[0].moved_bytes == 2 * rows + numbers
    assert found.of("index")[0].moved_bytes == 2 * rows + numbers
    assert found.of("index_add_")[0].moved_bytes == 3 * rows + numbers


@pytest.mark.parametrize(
    ("call", "name", "kind"),
    [
        (lambda images: functional.batch_norm(images, None, None, training=True), "native_batch_norm", "batch_norm"),
        (lambda images: functional.layer_norm(images, [8]), "native_layer_norm", "layer_norm"),
        (lambda images: functional.max_pool2d(images, 2), "max_pool2d_with_indices", "max_pool"),
        (lambda images: images.log_softmax(-1), "_log_softmax", "softmax"),
        (lambda images: images.log_softmax(1), "_log_softmax", "softmax_across"),
        (lambda images: functional.gelu(images), "gelu", "activation"),
        (lambda images: images.bernoulli_(0.5), "bernoulli_", "random"),
        (lambda images: functional.relu(images), "relu", "memory"),
    ],
)
def test_kernels_slower_than_memory_are_told_apart(call, name, kind):
    found = one(lambda: call(torch.empty(2, 4, 8, 8)), name)
    assert (found.kind, found.flops) == (kind, 0)
    assert found.moved_bytes >= F * 512


def test_a_loss_of_classes_reads_one_score_a_row_and_its_gradient_writes_all():
    def run():
        return functional.nll_loss(torch.empty(6, 100, requires_grad=True), torch.zeros(6, dtype=torch.int64))

    both = backward_of(run)
    assert both.of("nll_loss_forward")[0].moved_bytes < F * 100
    assert F * 600 <= both.of("nll_loss_backward")[0].moved_bytes < F * 700


@pytest.mark.parametrize(
    ("implementation", "name", "passes"),
    [
        ({"fused": True}, "_fused_adamw_", 7),  # weight, two states read and written; gradient read
        ({"foreach": True}, "_foreach_addcdiv_", 4),  # weight read and written, two states read
    ],
)
def test_optimizers_over_lists_touch_every_tensor_of_them(implementation, name, passes):
    def run():
        model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 50, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), **implementation)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()

    found = one(run, name)
    weights = F * (100 * 100 + 100 * 50)
    assert (found.kind, found.dtype, found.flops) == ("memory", "fp32", 0)
    assert passes * weights <= found.moved_bytes < passes * weights + 100


def test_real_tensors_cost_what_fake_ones_do():
    with Counting() as counting:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert counting.of("mm")[0].flops == 2 * 3 * 5 * 7
