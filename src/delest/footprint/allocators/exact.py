"""Live bytes and nothing else."""

from __future__ import annotations


class Exact:
    """Holds what was asked for, to the byte."""

    def __init__(self) -> None:
        self.held_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._next = 0

    def allocate(self, size: int) -> int:
        """A handle of a new block of `size` bytes."""
        self._next += 1
        self._sizes[self._next] = self._taken(size)
        self.held_bytes += self._sizes[self._next]
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return self._next

    def free(self, handle: int) -> None:
        """Give a block back."""
        self.held_bytes -= self._sizes.pop(handle)

    def _taken(self, size: int) -> int:
        """Bytes that are held for a request of `size`."""
        return size
