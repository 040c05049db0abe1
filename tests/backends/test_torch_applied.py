"""delest.apply: a plan in somebody's own loop gives what their plain loop gives."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import functools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delest
from delest import errors, malloc, storage
from delest.backends.torch.model import fingerprint
from delest.backends.torch.quantised_adamw import AdamW8bit
from delest.records.plan import Choice, Plan

cross_entropy = nn.functional.cross_entropy


def plan(*, threads: int | None = None, **configs: dict[str, Any]) -> Plan:
    choices = tuple(Choice(method=name, config=config, keeps="rounding", why="") for name, config in configs.items())
    return Plan(choices=choices, batch_size=12, micro_batch=12, threads=threads)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 3)).double()


def batch(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64), torch.randint(3, (rows,), generator=generator)


def plain_loop(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None) -> list[float]:
    losses = []
    for step in range(steps):
        x, y = batch(step)
        loss = cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses


CHOSEN = {
    "nothing": {},
    "parts": {"micro_batch": {"rows": 5}},
    "checkpointing": {"activation_checkpointing": {"modules": ["2"]}},
    "in backward": {"optimizer_in_backward": {}},
    "parts and checkpointing": {"micro_batch": {"rows": 4}, "activation_checkpointing": {"modules": ["0", "2"]}},
}


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fifty_steps_are_those_of_the_plain_loop(kind: Any, chosen: str) -> None:
    net = model()
    other = copy.deepcopy(net)
    optimizer, given = kind(net.parameters(), lr=0.01), kind(other.parameters(), lr=0.01)
    halving, same = (torch.optim.lr_scheduler.StepLR(one, 20, 0.5) for one in (optimizer, given))
    losses = plain_loop(net, optimizer, 50, halving)
    applied = delest.apply(plan(**CHOSEN[chosen]), other, given, cross_entropy)
    assert applied.optimizer is given
    assert applied.model is other
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler sees the optimizer's steps
        for step in range(50):
            got.append(float(applied.step(batch(step))))
            same.step()
    assert got == pytest.approx(losses, rel=1e-9)
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-9)
        assert right.grad is None


@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_loop_body_of_ones_own(chosen: str) -> None:
    net = model()
    other = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = plain_loop(net, optimizer, 10)
    applied = delest.apply(plan(**CHOSEN[chosen]), other, torch.optim.AdamW(other.parameters(), lr=0.01))
    for step in range(10):
        total = 0.0
        for (x, y), share in applied.parts(batch(step)):
            with applied.precision():
                loss = cross_entropy(other(x), y) * share
            loss.backward()
            total += loss.item()
        applied.optimizer.step()
        applied.optimizer.zero_grad()
        assert total == pytest.approx(losses[step], rel=1e-9)


@pytest.mark.parametrize(("rows", "most", "sizes"), [(12, 5, [4, 4, 4]), (7, 3, [2, 2, 3]), (3, 5, [3]), (1, 1, [1])])
def test_parts_are_no_larger_than_the_plans_and_weigh_their_rows(rows: int, most: int, sizes: list[int]) -> None:
    applied = delest.apply(plan(micro_batch={"rows": most}), net := model(), torch.optim.SGD(net.parameters(), lr=0.1))
    found = list(applied.parts({"x": batch(0, rows)[0], "rates": torch.ones(50), "name": "n"}))
    assert [len(part["x"]) for part, _ in found] == sizes
    assert all(len(part["rates"]) == 50 and part["name"] == "n" for part, _ in found)
    assert [share for _, share in found] == pytest.approx([size / rows for size in sizes])


def test_inputs_are_tensors_tuples_mappings_and_lists() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> Any:
            scores = self.left(a) + self.right(b)
            return scores if labels is None else SimpleNamespace(loss=cross_entropy(scores, labels))

    def step(given: Any, loss: Any) -> float:
        torch.manual_seed(0)
        net = Two()
        return float(
            delest.apply(plan(micro_batch={"rows": 4}), net, torch.optim.SGD(net.parameters(), lr=0.1), loss).step(given)
        )

    x, y = batch(0)
    a, b = x.float(), x.float().flip(0)
    expected = step(((a, b), y), cross_entropy)
    assert step([[a, b], y], cross_entropy) == pytest.approx(expected)
    assert step(({"a": a, "b": b}, y), cross_entropy) == pytest.approx(expected)
    assert step({"a": a, "b": b, "labels": y}, None) == pytest.approx(expected)
    assert step((a, b, y), None) == pytest.approx(expected)


def test_a_loss_is_needed_from_somewhere() -> None:
    net = model()
    applied = delest.apply(plan(), net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(errors.BadInput, match="gives a Tensor without a loss: pass"):
        applied.step(batch(0)[0])
    applied = delest.apply(plan(), net, torch.optim.SGD(net.parameters(), lr=0.1), cross_entropy)
    with pytest.raises(errors.BadInput, match="a pair"):
        applied.step({"x": batch(0)[0]})
    with pytest.raises(errors.BadInput, match="no rows"):
        applied.step(batch(0, 0))
    with pytest.raises(errors.BadInput, match="holds no tensor"):
        applied.step(("a", "b"))


def test_a_new_optimizer_has_the_groups_and_settings_of_the_given_one() -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[1].parameters(), "weight_decay": 0.0}]
    given = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-6)
    for state in (False, True):  # without and with moments of its own
        if state:
            plain_loop_step(net, given)
        applied = delest.apply(plan(optimizer_state={"bits": 8}), net, given, cross_entropy)
        made = applied.optimizer
        assert type(made) is AdamW8bit
        assert [(group["lr"], group["betas"], group["eps"], group["weight_decay"]) for group in made.param_groups] == [
            (0.3, (0.8, 0.99), 1e-6, 0.01),
            (0.01, (0.8, 0.99), 1e-6, 0.0),
        ]
        assert applied.changes == (
            "optimizer_state: bits 8",
            "optimizer: a new AdamW8bit in place of the AdamW, same groups and settings",
        )
        assert bool(made.state) is state
        applied.step((torch.ones(4, 100), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("method", "config", "kind"), [("optimizer_state", {"bits": 4}, "AdamW4bit"), ("factored_state", {}, "FactoredAdamW")]
)
def test_smaller_states_are_applied_with_updates_in_the_backward_pass(method: str, config: dict[str, int], kind: str) -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    given = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    applied = delest.apply(plan(**{method: config, "optimizer_in_backward": {}}), net, given, cross_entropy)
    assert type(applied.optimizer).__name__ == kind
    assert [(group["lr"], group["weight_decay"]) for group in applied.optimizer.param_groups] == [(0.01, 0.1)]
    batch = torch.randn(8, 100), torch.zeros(8, dtype=torch.int64)
    losses = [float(applied.step(batch)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    again = delest.apply(plan(**{method: config, "optimizer_in_backward": {}}), net, applied.optimizer, cross_entropy)
    assert again.optimizer is applied.optimizer


def plain_loop_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "build",
    [
        lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, 10),
        lambda one: torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0),
        lambda one: torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=10),
    ],
)
def test_a_scheduler_on_an_optimizer_that_must_go_is_refused_by_name(build: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = build(optimizer)
    with pytest.raises(errors.BadInput, match=f"a {type(scheduler).__name__} is attached"):
        delest.apply(plan(optimizer_state={"bits": 8}), net, optimizer)
    with pytest.raises(errors.BadInput, match="factored_state needs a new optimizer"):
        delest.apply(plan(factored_state={}), net, optimizer)
    delest.apply(plan(optimizer_in_backward={}), net, optimizer)


def test_all_that_stands_against_a_plan_is_reported_together() -> None:
    net = model()
    both = plan(optimizer_in_backward={}, micro_batch={"rows": 4})
    with pytest.raises(errors.BadInput) as raised:
        delest.apply(both, net, torch.optim.Adafactor(nn.Linear(2, 2).parameters()))
    assert len(raised.value.faults) == 3
    assert "last part" in str(raised.value)
    assert "none of the model's parameters" in str(raised.value)

    class AdamW(torch.optim.AdamW):
        """Somebody's own, of which only the name is known."""

    with pytest.raises(errors.BadInput, match=r"test_torch_applied\.AdamW does not update element by element"):
        delest.apply(plan(optimizer_in_backward={}), net, AdamW(net.parameters()))
    with pytest.raises(errors.BadInput, match="no module 'nine'"):
        delest.apply(plan(activation_checkpointing={"modules": ["nine"]}), net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_the_example_of_its_documentation_runs() -> None:
    from delest.verbs import own_loop

    found = doctest.testmod(own_loop)
    assert (found.failed, found.attempted > 5) == (0, True)


def test_what_is_no_plan_model_or_optimizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(errors.BadInput) as raised:
        delest.apply(None, "model", "optimizer", 3)  # type: ignore[arg-type]
    assert len(raised.value.faults) == 4
    net = model()
    with pytest.raises(errors.BadInput, match="does not exist"):
        delest.apply(tmp_path / "plan.json", net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_plan_comes_from_a_file_and_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        storage.write_json(tmp_path / "plan.json", plan(threads=1, micro_batch={"rows": 3}))
        net = model()
        applied = delest.apply(str(tmp_path / "plan.json"), net, torch.optim.SGD(net.parameters(), lr=0.1))
        assert applied.changes == ("threads: torch.set_num_threads(1)", "micro_batch: rows 3")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_must_act_before_the_process_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "current", lambda: "glibc")
    net = model()
    applied = delest.apply(plan(allocator={"name": "jemalloc"}), net, torch.optim.SGD(net.parameters(), lr=0.1))
    (line,) = applied.changes
    assert line.startswith("allocator: name jemalloc; not yet applied")
    assert "delest exec plan.json -- python train.py" in line


def test_parts_of_a_normalising_model_warn_and_never_hold_one_row() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(errors.DelestWarning, match=r"freeze those layers with eval\(\).*GroupNorm") as caught:
        applied = delest.apply(plan(micro_batch={"rows": 1}), net, optimizer, cross_entropy)
    assert caught[0].filename == __file__
    for rows in (12, 5, 3):
        applied.step(batch(0, rows))
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delest.apply(plan(micro_batch={"rows": 1}), net, optimizer, cross_entropy)


def test_channels_last_takes_weights_images_and_moments_along() -> None:
    """torch's fused optimizers walk weights and moments in step: moments of another layout would belong to other weights."""

    def trained(chosen: Plan | None) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3)).double()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
        images = torch.randn(12, 3, 6, 6, dtype=torch.float64)
        applied = delest.apply(plan(), net, optimizer, cross_entropy)
        for step in range(6):
            if step == 3 and chosen is not None:
                applied = delest.apply(chosen, net, optimizer, cross_entropy)
            applied.step((images, batch(step)[1]))
        return net

    last = plan(memory_format={"format": "channels_last"}, micro_batch={"rows": 6})
    expected, got = trained(None), trained(last)
    assert got[0].weight.is_contiguous(memory_format=torch.channels_last)
    for left, right in zip(expected.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-9)


def test_bf16_runs_under_autocast() -> None:
    net = model().float()
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    applied = delest.apply(plan(precision={"dtype": "bf16"}), net, torch.optim.SGD(net.parameters(), lr=0.1), cross_entropy)
    x, y = batch(0)
    applied.step((x.float(), y))
    assert seen == [torch.bfloat16]
    assert "applied.precision()" in applied.changes[0]
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='none'"),
        (nn.CrossEntropyLoss, "is a class"),
    ],
)
def test_a_loss_that_is_no_mean_over_rows_is_refused(loss, said):
    model = nn.Linear(4, 2)
    plan = Plan(batch_size=8, micro_batch=8, threads=1)
    with pytest.raises(errors.BadInput, match=said):
        delest.apply(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), loss)


CLASSES = torch.tensor([1.0, 9.0, 0.5], dtype=torch.float64)
CROSS_ENTROPIES = {
    "module": nn.CrossEntropyLoss(),
    "module, another number": nn.CrossEntropyLoss(ignore_index=2),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(weight=CLASSES),
    "function": cross_entropy,
    "partial": functools.partial(cross_entropy, ignore_index=1),
    "weighted partial": functools.partial(cross_entropy, weight=CLASSES),
}


def gradients_of(chosen: Plan, loss: Any, x: Tensor, y: Tensor, net: nn.Module) -> list[Tensor]:
    other = copy.deepcopy(net)
    applied = delest.apply(chosen, other, torch.optim.SGD(other.parameters(), lr=0.1), loss)
    for part, share in applied.parts((x, y)):
        (loss(other(part[0]), part[1]) * share).backward()
    return [parameter.grad for parameter in other.parameters()]


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize("tokens", [False, True])
def test_targets_that_are_ignored_do_not_count_in_a_parts_share(name: str, tokens: bool) -> None:
    class Words(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(-1, 1)

    torch.manual_seed(0)
    net = Words(6, 3).double() if tokens else model()
    x, y = batch(0)
    if tokens:
        x, y = x[:, None].expand(12, 5, 6) * torch.rand(12, 5, 1, dtype=torch.float64), torch.randint(3, (12, 5))
    y[:5] = getattr(
        CROSS_ENTROPIES[name], "ignore_index", getattr(CROSS_ENTROPIES[name], "keywords", {}).get("ignore_index", -100)
    )
    loss = CROSS_ENTROPIES[name]  # of the first part of four rows none counts, of the second three
    expected = gradients_of(plan(), loss, x, y, net)
    got = gradients_of(plan(micro_batch={"rows": 4}), loss, x, y, net)
    for left, right in zip(expected, got, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-12)


def test_class_probabilities_are_a_mean_over_rows() -> None:
    net = model()
    x, y = batch(0)[0], torch.softmax(batch(1)[0][:, :3], 1)
    expected, got = (gradients_of(plan(micro_batch={"rows": rows}), cross_entropy, x, y, net) for rows in (12, 5))
    for left, right in zip(expected, got, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-12)


def test_a_batch_of_ignored_targets_alone_is_what_it_is_in_the_plain_loop() -> None:
    net = model()
    applied = delest.apply(plan(micro_batch={"rows": 4}), net, torch.optim.SGD(net.parameters(), lr=0.1), cross_entropy)
    assert torch.isnan(applied.step((batch(0)[0], torch.full((12,), -100))))


def test_ignored_targets_under_a_loss_that_is_not_known_are_told_of_once_by_name() -> None:
    def my_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": cross_entropy(self.net(x), labels)}

    x, y = batch(0)
    y[:5] = -100
    for net, loss, given, name in (
        (model(), my_loss, (x, y), "the loss my_loss"),
        (Own(), None, {"x": x, "labels": y}, "the model's own loss"),
    ):
        applied = delest.apply(plan(micro_batch={"rows": 4}), net, torch.optim.SGD(net.parameters(), lr=0.1), loss)
        with pytest.warns(errors.DelestWarning, match=f"hold -100.*{name}") as caught:
            _ = [list(applied.parts(given)) for _ in range(2)]  # a step of its own measures it
        assert len(caught) == 1
        whole = delest.apply(plan(), net, torch.optim.SGD(net.parameters(), lr=0.1), loss)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole.step(given)


@pytest.mark.parametrize("setting", [{"ignore_index": 255}, {"weight": torch.ones(3)}])
def test_a_loss_of_somebodys_own_that_ignores_or_weighs_is_warned_of_by_name(setting: dict[str, Any]) -> None:
    class Focal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self).update(setting)

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.mean()

    net = model()
    with pytest.warns(errors.DelestWarning, match=f"the loss Focal has {next(iter(setting))}"):
        delest.apply(plan(micro_batch={"rows": 4}), net, torch.optim.SGD(net.parameters(), lr=0.1), Focal())


def test_a_sum_in_a_partial_is_refused() -> None:
    net = model()
    with pytest.raises(errors.BadInput, match="reduction='sum'"):
        delest.apply(plan(), net, torch.optim.SGD(net.parameters(), lr=0.1), functools.partial(cross_entropy, reduction="sum"))


def test_a_plan_of_another_model_is_refused_and_one_of_the_same_shapes_is_not() -> None:
    net = model()
    made = dataclasses.replace(plan(micro_batch={"rows": 4}), model=fingerprint(net))

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

    for other, said in (
        (nn.Linear(6, 3), "another model: that has 435 parameters in 6 tensors, this one 21 in 2 tensors"),
        (nn.Sequential(*reversed(model())), "this one as many, of other shapes"),
    ):
        with pytest.raises(errors.BadInput, match=said):
            delest.apply(made, other, torch.optim.SGD(other.parameters(), lr=0.1), cross_entropy)
    for same in (net, Renamed()):
        delest.apply(made, same, torch.optim.SGD(same.parameters(), lr=0.1), cross_entropy)


IGNORING = torch.where(torch.arange(32) < 20, -100, torch.arange(32) % 3)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (lambda outputs, targets: cross_entropy(outputs, targets), IGNORING),
        (lambda outputs, targets: cross_entropy(outputs, targets), IGNORING.clamp(min=0)),
        (lambda outputs, targets: cross_entropy(outputs, targets, reduction="sum") / 100, IGNORING.clamp(min=0)),
    ],
)
def test_how_a_function_of_ones_own_adds_up_is_measured(loss: Any, targets: Tensor) -> None:
    nets = [nn.Linear(6, 3, dtype=torch.float64) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    inputs = torch.randn(32, 6, dtype=torch.float64)
    applied = delest.apply(plan(micro_batch={"rows": 8}), nets[0], optimizers[0], loss)
    for _ in range(3):
        ours = applied.step((inputs, targets))
        theirs = loss(nets[1](inputs), targets)
        theirs.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert float(ours) == pytest.approx(theirs.item(), rel=1e-9)
    assert torch.allclose(nets[0].weight, nets[1].weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 25.0], dtype=torch.float64)),
        lambda outputs, targets: (outputs @ outputs.T).logsumexp(1).mean(),
    ],
)
def test_a_function_that_does_not_add_up_is_refused_before_anything_changes(loss: Any) -> None:
    net = nn.Linear(6, 3, dtype=torch.float64)
    before = net.weight.detach().clone()
    applied = delest.apply(plan(micro_batch={"rows": 8}), net, torch.optim.SGD(net.parameters(), lr=0.1), loss)
    with pytest.raises(errors.BadInput, match="cannot be made in parts.*CrossEntropyLoss"):
        applied.step((torch.randn(32, 6, dtype=torch.float64), torch.arange(32) % 3))
    assert torch.equal(net.weight, before)


def test_a_model_that_needs_a_loss_says_so() -> None:
    net = nn.Linear(6, 3)
    applied = delest.apply(plan(), net, torch.optim.SGD(net.parameters()))
    with pytest.raises(errors.BadInput, match="pass delest.apply"):
        applied.step((torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)))
