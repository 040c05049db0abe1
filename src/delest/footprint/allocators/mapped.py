"""glibc's malloc with M_MMAP_THRESHOLD fixed: large blocks are mappings of their own."""

from __future__ import annotations

from delest.footprint.allocators.exact import Exact

THRESHOLD = 64 << 10
PAGE = 4096


def chunk_bytes(size: int) -> int:
    """A request with malloc's header, in its granules of 16 bytes (malloc/malloc.c, request2size)."""
    return max(32, (size + 8 + 15) & ~15)


def aligned_request(size: int) -> int:
    """What malloc is asked for so that a block aligned to 64 bytes, as PyTorch wants it, can be cut out.

    The chunk, the alignment and the smallest chunk: malloc/malloc.c, _int_memalign.
    """
    return chunk_bytes(size) + 64 + 32


def mapping_bytes(chunk: int) -> int:
    """Whole pages for a chunk and its second header field (malloc/malloc.c, sysmalloc_mmap)."""
    return (chunk + 8 + PAGE - 1) & ~(PAGE - 1)


class Mapped(Exact):
    """From 64 KiB on each block is a mapping that goes back to the system when it is freed; smaller ones share a heap, whose
    holes are too small to count."""

    def _taken(self, size: int) -> int:
        chunk = chunk_bytes(aligned_request(size))
        return mapping_bytes(chunk) if chunk >= THRESHOLD else chunk_bytes(size)
