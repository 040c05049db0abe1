"""What a process or a device holds for the tensors that live: allocators simulated on sizes alone, one file each."""

from __future__ import annotations

from typing import Protocol

from delest.footprint.allocators.caching import Caching
from delest.footprint.allocators.exact import Exact
from delest.footprint.allocators.mapped import Mapped


class Allocator(Protocol):
    """Gives and takes back blocks; sizes are bytes."""

    @property
    def held_bytes(self) -> int:
        """What is held from the system now."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that was ever held."""
        ...

    def allocate(self, size: int) -> int:
        """A handle of a new block of `size` bytes."""
        ...

    def free(self, handle: int) -> None:
        """Give a block back; its handle is then void."""
        ...


__all__ = ["Allocator", "Caching", "Exact", "Mapped"]
