import pytest
import torch
from torch import nn

from delest.backends.torch.distillation import OBJECTIVES, _one_forward, of_classes, of_numbers


def test_a_student_is_pulled_towards_its_teacher_also_with_two_classes():
    for classes in (2, 5):
        for objective in OBJECTIVES:
            outputs = torch.zeros(4, classes, requires_grad=True)
            answer, targets = torch.zeros(4, classes), torch.ones(4, dtype=torch.int64)
            answer[:, 1] = 3.0
            with torch.no_grad():
                outputs[:, 0] += 0.1
            of_classes(outputs, answer, targets, objective).backward()
            assert outputs.grad[:, 1].max() < -1e-3, (classes, objective)


def test_a_teacher_that_is_matched_costs_nothing_and_one_row_is_enough():
    answer = torch.randn(6, 1)
    assert of_numbers(answer, answer) == 0
    assert torch.isfinite(of_numbers(torch.randn(1, 1), torch.randn(1, 1)))
    logits = torch.randn(6, 5)
    assert of_classes(3 * logits + 1, logits, torch.zeros(6, dtype=torch.int64), "standardised") < 1e-6


def test_channels_of_a_grid_have_units_of_their_own():
    answer = torch.randn(8, 3, 4, 4) * torch.tensor([1.0, 100.0, 0.01]).view(1, 3, 1, 1)
    assert of_numbers(answer, answer) == 0
    means = answer.mean((0, 2, 3), keepdim=True)
    assert of_numbers(means.expand_as(answer), answer) == pytest.approx(1.0, rel=1e-4)


def test_step_and_predict_share_a_forward_until_its_outputs_are_changed():
    network = nn.Linear(3, 2)
    plain, x = network.forward, torch.randn(4, 3)
    with _one_forward(network):
        first = network(x)
        assert network(x) is first
        assert network(x.clone()) is not first
        again = network(x)
        again.add_(1)
        assert torch.equal(network(x), plain(x))
    assert "forward" not in vars(network)
    assert network(x) is not first
