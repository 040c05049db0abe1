"""Compute each operator in one thread, where a step is so small that threads wait for each other longer than they work.

The order of additions is another then, so that results are the same to rounding.

Source: https://docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html, "Tuning the number of threads".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "process"
SETTINGS: Settings = {"count": int}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "rounding"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def environment(config: dict[str, Any]) -> dict[str, str]:
    """For libraries that the process loads, and its children."""
    return {name: str(config["count"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def waits(config: dict[str, Any]) -> bool:
    """PyTorch changes its threads while it runs."""
    return False


def code(config: dict[str, Any]) -> str:
    return f"torch.set_num_threads({config['count']})"
