from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from delest.backends.torch.distillation import (
    OBJECTIVES,
    Mixture,
    StudentSession,
    Teacher,
    _one_forward,
    of_classes,
    of_numbers,
)
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch, State
from delest.records.plan import Plan
from delest.records.source import Column, Schema, Target


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


SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(6,)),),
    target=Target(name="y", kind="class", classes=("a", "b", "c")),
)
PLAN = Plan(batch_size=32, micro_batch=32, threads=1)


def mlp(hidden=16):
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def numpy_batch(rows=32):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 6)).astype(np.float32)
    return Batch(x, random.integers(0, 3, rows), np.arange(rows), 0, rows)


def kept(teacher):
    return Teacher(teacher, rows=32, keep=True)


def teacher_of(model=mlp):
    return TorchSession(Job(model=model, data="unused", batch_size=32), PLAN, SCHEMA)


def test_a_teacher_answers_each_row_once_and_not_in_training_mode():
    session = teacher_of(lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)))
    given, calls = session.tensors(numpy_batch()), []
    session.model.register_forward_hook(lambda *_: calls.append(session.model.training))
    answers = kept(session)
    first, again = answers.answer(given), answers.answer(given)
    assert calls == [False]
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(first, session.model[0](given.inputs).detach())
    anew = Teacher(session, rows=32, keep=False)
    assert anew.answer(given) is not None
    assert anew.answer(given) is not None
    assert calls == [False] * 3


def test_a_row_is_mixed_with_another_and_both_targets_count_by_their_shares():
    torch.manual_seed(0)
    x = torch.randn(64, 1, 5, 5)
    mixture = Mixture.draw(x)
    assert sorted(mixture.others.tolist()) == list(range(64))
    assert 0 <= mixture.shares.min() < 0.2 < 0.8 < mixture.shares.max() <= 1
    expected = mixture.shares[3] * x[3] + (1 - mixture.shares[3]) * x[mixture.others[3]]
    torch.testing.assert_close(mixture.inputs[3], expected)
    outputs, targets = torch.randn(64, 3), torch.randint(0, 3, (64,))
    soft = mixture.shares[:, None] * F.one_hot(targets, 3) + (1 - mixture.shares)[:, None] * F.one_hot(
        targets[mixture.others], 3
    )
    loss = mixture.loss(lambda o, t: F.cross_entropy(o, t, reduction="none"), outputs, targets)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, soft))
    larger = mixture.targets(targets)
    assert torch.equal(larger == soft.argmax(1), torch.ones(64, dtype=torch.bool))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_mixtures_a_student_comes_nearer_to_its_teacher_between_the_rows(objective):
    """Away from the rows, where nothing but the teacher says what is right."""
    teacher = teacher_of(lambda: mlp(32))
    for _ in range(200):
        teacher.step(numpy_batch(), 1.0)
    random = torch.Generator().manual_seed(5)
    x = torch.randn(400, 6, generator=random)

    def agreement(mixing):
        job = Job(model=lambda: mlp(8), data="unused", batch_size=32, recipe=Recipe(lr=0.01))
        student = StudentSession(job, PLAN, SCHEMA, Teacher(teacher, rows=32, keep=True), objective, mixing=mixing)
        for _ in range(400):
            student.step(numpy_batch(), 1.0)
        return float((student.model(x).argmax(1) == teacher.model(x).argmax(1)).float().mean())

    assert agreement(True) > agreement(False)


def test_a_student_has_no_dropout_and_its_steps_are_repeatable():
    teacher = teacher_of()

    def trained():
        layers = (nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        job = Job(model=lambda: nn.Sequential(*layers), data="unused", batch_size=32)
        student = StudentSession(job, PLAN, SCHEMA, Teacher(teacher, rows=32, keep=True))
        assert student.model[2].p == 0.0
        state = {name: array.copy() for name, array in student.state().arrays.items()}
        return student, state

    student, before = trained()
    losses = [float(student.step(numpy_batch(), 1.0).loss) for _ in range(5)]
    student.load(State(before, student.state().scalars))
    assert [float(student.step(numpy_batch(), 1.0).loss) for _ in range(5)] == losses


def test_what_cannot_be_mixed_is_learnt_row_by_row():
    """Numbers as targets, and inputs that are no floats."""
    numbers = Schema(inputs=SCHEMA.inputs, target=Target(name="y", kind="number"))
    teacher = TorchSession(Job(model=lambda: nn.Linear(6, 1), data="unused", batch_size=32), PLAN, numbers)
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    student = StudentSession(Job(model=lambda: nn.Linear(6, 1), data="unused", batch_size=32), PLAN, numbers, kept(teacher))
    targets = np.zeros((32, 1), np.float32)
    for _ in range(3):
        student.step(replace(numpy_batch(), targets=targets), 1.0)
    assert len(calls) == 1
    words = teacher_of(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3)))
    words.model.register_forward_hook(lambda *_: calls.append(1))
    student = StudentSession(words.job, PLAN, SCHEMA, kept(words))
    for _ in range(3):
        student.step(replace(numpy_batch(), inputs=np.ones((32, 6), np.int64)), 1.0)
    assert len(calls) == 2
