"""The protocols between delest and a framework. A backend builds sessions; a session owns the model and makes steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.job import Job
    from delest.records.batch import Batch, Outputs, State, Step
    from delest.records.plan import Plan
    from delest.records.pruning import Layer, Width
    from delest.records.source import Schema


class Splits(Protocol):
    """Steps that can be made in parts: all that the memory guard sees of them."""

    parts: int  # micro-batches a step is made of, and an evaluation's batch too; set between steps only

    @property
    def most_parts(self) -> int:
        """The largest useful `parts`: more would leave a micro-batch fewer rows than the model can take."""

    def warm(self) -> None:
        """Start what a first step starts besides its tensors, so that a limit on memory can be set after it."""


class Session(Splits, Protocol):
    """Model, loss, optimizer, precision and splitting: all that the training loop sees of a framework."""

    def step(self, batch: Batch, rate: float) -> Step:
        """One optimizer step. `rate` in [0, 1] multiplies every parameter group's own base rate.

        All or nothing: on failure it raises (`OutOfMemory` with the phase, for memory) with weights, gradients, buffers,
        optimizer and random state as before the call. With updates in the backward pass that holds until the first of them:
        `OutOfMemory.begun` says so.
        """

    def outputs(self, feed: Any) -> Iterator[Outputs]:
        """Evaluation mode over `feed.ordered()`, batch by batch, NumPy."""

    def predict(self, inputs: Any) -> Any:
        """Outputs for inputs as the model receives them, in evaluation mode and fp32, NumPy in and out."""

    def answering(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """`predict` for many calls: what it has to keep and restore is kept once around all of them."""

    def state(self) -> State:
        """Weights, buffers, optimizer and random state."""

    def load(self, state: State) -> None: ...

    def weights(self) -> dict[str, Any]:
        """Parameters and buffers by name, NumPy (bf16 as uint16)."""

    def load_weights(self, arrays: Mapping[str, Any]) -> None: ...

    def parameters(self) -> int:
        """How many parameters the model has, frozen ones included."""


class Backend(Protocol):
    """One framework."""

    name: str

    @property
    def runtime(self) -> str:
        """What runs a session's network, in words."""

    def versions(self) -> dict[str, str]:
        """Of what computes, by name."""

    def session(self, job: Job, plan: Plan, schema: Schema) -> Session: ...

    def export(self, session: Session, inputs: Any, path: Path) -> None:
        """Write the bare network as ONNX with a dynamic batch. `inputs` are two rows as the model receives them, NumPy."""

    def pruner(self, session: Session, job: Job, architecture: Mapping[str, Any] | None, inputs: Any) -> Pruner:
        """What makes a copy of a session's network narrower, which is by `architecture` narrower already than the job's factory builds it."""

    def narrower(self, job: Job, schema: Schema, architecture: Mapping[str, Any]) -> Job:
        """The job with a factory of the narrower network."""

    def teacher(self, session: Session, feed: Any, *, keep: bool) -> Any:
        """A trained session as it teaches the rows of a feed; with `keep` each row is answered once, now."""

    def student(self, job: Job, plan: Plan, schema: Schema, teacher: Any) -> Session:
        """A session that learns from targets and from the answers of a teacher."""


class Pruner(Protocol):
    """A network being cut; names, NumPy and JSON, no tensors."""

    @property
    def widths(self) -> tuple[Width, ...]:
        """What can be made narrower."""

    @property
    def layers(self) -> dict[str, Layer]:
        """Layers with parameters, as a forward pass saw them."""

    def score(self, feed: Any, batches: int) -> dict[str, NDArray]:
        """What each unit is worth, float64 [units] by width."""

    def cut(self, cuts: Mapping[str, Sequence[int]]) -> None: ...

    def architecture(self) -> dict[str, Any]:
        """How the network differs from what the factory builds, as JSON."""

    def weights(self) -> dict[str, NDArray]:
        """Parameters and buffers by name."""
