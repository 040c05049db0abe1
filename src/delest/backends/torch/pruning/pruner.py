"""A trained network, made narrower step by step, as `shrinking` sees it: NumPy and names, no tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from delest.backends.torch import model as models
from delest.backends.torch.pruning.architecture import describe, rebuild, shapes_of, sizes_of
from delest.backends.torch.pruning.widths import Found, cut, find_widths, score_units
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.pruning import Layer, Width
from delest.records.source import Schema


class Pruner:
    """A network being cut, and the session whose loss and `predict` judge it."""

    def __init__(self, session: TorchSession, job: Job, architecture: Mapping[str, Any] | None, inputs: Any):
        """`session` has the trained network, `architecture` what it is already narrower by than the factory of `job` builds it; `inputs`
        are two rows as the model receives them. The session's network is not touched."""
        self.session, self._inputs = session, inputs
        fresh = models.build(job, session.schema)
        self._sizes, self._shapes = sizes_of(fresh), shapes_of(fresh)
        self.model = rebuild(fresh, architecture) if architecture else fresh
        self.model.load_state_dict(session.model.state_dict())
        self._found: Found | None = None

    @property
    def widths(self) -> tuple[Width, ...]:
        return self.found.widths

    @property
    def layers(self) -> dict[str, Layer]:
        return self.found.layers

    @property
    def found(self) -> Found:
        """What can be made narrower; each width is tried on a copy first, once."""
        if self._found is None:
            self._found = find_widths(self.model, self._run)
        return self._found

    def score(self, feed: Any, batches: int) -> dict[str, NDArray]:
        """What each unit is worth by the job's loss on so many batches of a feed, float64 [units] by width."""

        def losses() -> Any:
            for batch in itertools.islice(feed.ordered(), batches):
                yield lambda batch=batch: self._loss(batch)

        return {name: score.numpy() for name, score in score_units(self.model, self._run, losses()).items()}

    def cut(self, cuts: Mapping[str, Sequence[int]]) -> None:
        """Cut units off. Raises what stands in the way; the network is then of no use any more."""
        cut(self.model, self._run, cuts)
        self._found = None

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def architecture(self) -> dict[str, Any]:
        """How the network differs from what the factory builds, for `architecture.rebuild`."""
        return describe(self.model, self._sizes, self._shapes)

    def weights(self) -> dict[str, NDArray]:
        """Parameters and buffers by name, copied."""
        return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in self.model.state_dict().items()}

    def _run(self, network: nn.Module) -> Any:
        inputs = self.session._to_tensor(self._inputs)
        return self.session.job.predict(network, inputs) if self.session.job.predict else models.call(network, inputs)

    def _loss(self, batch: Any) -> Tensor:
        tensors = self.session.tensors(batch)
        if self.session.job.step is not None:
            return self.session.job.step(self.model, tensors)
        return self.session.loss.mean(models.call(self.model, tensors.inputs), tensors.targets)


def narrower_job(job: Job, schema: Schema, architecture: Mapping[str, Any]) -> Job:
    """The job whose factory builds the narrower network, with fresh weights."""
    build: Callable[[], nn.Module] = lambda: rebuild(models.build(job, schema), architecture)  # noqa: E731
    return replace(job, model=build)
