"""Take tensors from the plan's malloc: glibc's threshold can be fixed while the process runs; a library must be there when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delest import malloc

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    if config["name"] == "mmap":
        malloc.fix_threshold()
