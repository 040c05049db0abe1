"""Networks of the zoo as jobs, on data that are generated: `planning_jobs.py:CASE`; for benchmarks/planning_time.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import zoo
from torch import Tensor

import delest

TRAIN_SHARE = 0.6
LABELS = 10  # that occur: more, in few rows, would be taken for numbers


def __getattr__(name: str) -> Any:
    """A factory of the job of that name."""
    try:
        case = zoo.find_case(name)
    except KeyError:
        raise AttributeError(name) from None
    return lambda: job_of(case)


def job_of(case: zoo.Case) -> delest.Job:
    """Optimizer, batch and loss of the case; everything that a plan may decide is left to it."""
    inputs, targets = case.inputs(max(40, int(case.batch_size / TRAIN_SHARE) + 8))
    more: dict[str, Any] = {}
    if isinstance(inputs, Tensor) and targets.ndim == 1:
        data: Any = (inputs.numpy(), targets.numpy() % LABELS)
    else:  # what is to be learnt is no single value a row
        named = inputs if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
        data = (
            {name: array(value) for name, value in named.items()} if isinstance(named, dict) else tuple(map(array, named)),
            None,
        )
        if targets is not None:
            data = ((*data[0], array(targets)), None)
        more["step"] = step_of(case)
    return delest.Job(
        model=case.model,
        data=data,
        batch_size=case.batch_size,
        split=delest.Split(train=TRAIN_SHARE, validation=0.2, selection=0.1, test=0.1),
        recipe=delest.Recipe(
            optimizer=case.optimizer_name, momentum=case.momentum if case.optimizer_name == "sgd" else None, epochs=1
        ),
        **more,
    )


def array(value: Tensor) -> np.ndarray:
    return value.contiguous().numpy()


def step_of(case: zoo.Case) -> Any:
    def step(model: Any, batch: Any) -> Tensor:
        if case.loss is None:
            return model(**batch.inputs).loss
        *inputs, targets = batch.inputs
        outputs = model(*inputs)
        return case.loss(outputs, targets.reshape(outputs.shape) if outputs.numel() == targets.numel() else targets)

    return step
