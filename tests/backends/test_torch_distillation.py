import torch

from delest.backends.torch.distillation import OBJECTIVES, of_classes, of_numbers


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
