"""Which malloc a process asks for and has; those that really change are looked at in processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delest import errors, malloc

HELD = """
import ctypes, sys
from delest import malloc
from delest.hardware.machine import resident_bytes

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free(libc.malloc(8 << 20))  # from here on glibc itself takes blocks of this size from its heap
before_fixing = malloc.current()
for name in sys.argv[1:]:
    getattr(malloc, name)()

def grown():
    before = resident_bytes()
    blocks = [libc.malloc(1 << 20) for _ in range(41)]
    for block in blocks:
        libc.memset(block, 1, 1 << 20)
    for block in blocks[:-1]:
        libc.free(block)  # the last one lies on top of the heap, which keeps all below it
    return resident_bytes() - before

held = grown()
malloc.give_back()
print(before_fixing, malloc.current(), held, resident_bytes())
"""


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}


def held(*calls: str, **variables: str) -> tuple[str, str, int]:
    done = subprocess.run(
        [sys.executable, "-c", HELD, *calls], env={**clean(), **variables}, capture_output=True, text=True, check=True
    )
    before, after, size, _ = done.stdout.split()
    return before, after, int(size)


needs_glibc = pytest.mark.skipif(not malloc.is_glibc(), reason="this system's malloc is not glibc's")


@needs_glibc
def test_freed_blocks_stay_by_default_and_go_with_a_fixed_threshold():
    kept = held()
    assert kept[:2] == ("glibc", "glibc")
    assert kept[2] > 35 << 20
    given = held(**malloc.environment("mmap"))
    assert given[:2] == ("mmap", "mmap")
    assert given[2] < 5 << 20


@needs_glibc
def test_the_threshold_can_be_fixed_and_moved_while_a_process_runs():
    fixed = held("fix_threshold")
    assert fixed[:2] == ("glibc", "mmap")
    assert fixed[2] < 5 << 20
    moved = held("fix_threshold", "move_threshold")
    assert moved[:2] == ("glibc", "glibc")
    assert moved[2] > 35 << 20


FREE = """
import ctypes
from delest import malloc

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
malloc.move_threshold()
before, blocks = malloc.free_bytes(), [libc.malloc(8 << 20) for _ in range(4)]
for block in blocks[:-1]:
    libc.free(block)
print(malloc.free_bytes() - before)
"""


HEAPS = """
import threading
from delest import malloc
from delest.hardware.machine import share_one_heap
from delest.training.guard import _started

found, asked, done = [malloc.has_main_heap()], threading.Semaphore(0), threading.Event()

def other():
    found.append(malloc.has_main_heap())
    asked.release()
    done.wait()

threads = [threading.Thread(target=other) for _ in range(3)]
for thread in threads:
    thread.start()
    asked.acquire()
share_one_heap()
found.append(_started().submit(malloc.has_main_heap).result())
done.set()
for thread in threads:
    thread.join()
found.append(_started().submit(malloc.has_main_heap).result())
print(*found)
"""


@needs_glibc
def test_the_guard_goes_on_in_a_thread_that_has_the_main_heap():
    done = subprocess.run([sys.executable, "-c", HEAPS], env=clean(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False", "True", "True"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this system's malloc does not say what is free")
def test_what_is_free_in_the_heap_is_told():
    found = int(subprocess.run([sys.executable, "-c", FREE], env=clean(), capture_output=True, text=True, check=True).stdout)
    assert 23 << 20 <= found <= 25 << 20


TOUCHED = """
import ctypes, os, resource
from delest import malloc

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
for name in ("keep_freed", "move_threshold"):
    assert getattr(malloc, name)()
    faults()
    found.append(faults())
assert malloc.keep_freed()
read, write = os.pipe()
if os.fork() == 0:  # which keeps nothing
    os.write(write, b"%d" % (faults() and faults()))
    os._exit(0)
print(*found, os.read(read, 99).decode())
"""


@needs_glibc
def test_large_blocks_that_are_kept_are_not_cleared_again():
    done = subprocess.run([sys.executable, "-c", TOUCHED], env=clean(), capture_output=True, text=True, check=True)
    kept, moved, in_child = map(int, done.stdout.split())
    assert kept == 0
    assert moved > 0
    assert in_child > 0


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "glibc"),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, "mmap"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, "mmap"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc"),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "jemalloc"),
        ({"LD_PRELOAD": "/a/libother.so:/opt/libtcmalloc.so.4", "MALLOC_MMAP_THRESHOLD_": "65536"}, "tcmalloc"),
    ],
)
def test_what_an_environment_asks_for(variables, name):
    assert malloc.started_with(variables) == name


@needs_glibc
def test_a_library_is_found_where_the_system_looks_and_comes_before_others(monkeypatch, tmp_path):
    monkeypatch.setattr(malloc, "_FOLDERS", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert "jemalloc" not in malloc.others()
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    assert malloc.others()[0] == "mmap"
    assert "jemalloc" in malloc.others()
    assert malloc.environment("jemalloc", {"LD_PRELOAD": "/a.so"}) == {"LD_PRELOAD": f"{library}:/a.so"}
    assert malloc.environment("jemalloc", {}) == {"LD_PRELOAD": str(library)}


def test_what_is_not_known_or_not_here_is_told_with_what_to_do(monkeypatch):
    with pytest.raises(errors.BadInput, match="use glibc, mmap, tcmalloc, jemalloc"):
        malloc.environment("mimalloc")
    monkeypatch.setattr(malloc, "_folders", lambda: [Path("/nowhere")])
    with pytest.raises(errors.BadInput, match="not on this system .*in /nowhere.*install it"):
        malloc.environment("tcmalloc")


@pytest.mark.skipif(not set(malloc.others()) & set(malloc.LIBRARIES), reason="neither tcmalloc nor jemalloc is installed")
def test_a_library_that_is_installed_is_what_the_process_has():
    for name in set(malloc.others()) & set(malloc.LIBRARIES):
        assert held(**malloc.environment(name))[:2] == (name, name)
