from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from delest.hardware import machine

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1000000 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\nSwapTotal: 2097152 kB\n"
X86 = "processor: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: fpu sse4_2 avx2 fma avx512f avx512_vnni unheard_of\n\nprocessor: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 i8mm sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
GIB = 1 << 30


def build_root(root: Path, files: dict[str, str]) -> Path:
    """A machine's /proc and /sys as files."""
    for name, text in {"proc/cpuinfo": X86, "proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine_is_described() -> None:
    here = machine.describe()
    assert here.processor
    assert 1 <= here.cores <= len(os.sched_getaffinity(0))
    assert 0 < here.available_bytes <= here.memory_bytes
    assert here.accelerators == ()


def test_sizes_from_files_that_stay_open_are_those_of_files_that_are_opened() -> None:
    gauge = machine.Gauge()
    try:
        more = mmap.mmap(-1, 8 << 20)
        more.write(bytes(8 << 20))
        resident, peak, data = gauge.sizes()
        assert (data, resident) == pytest.approx(machine.data_and_resident_bytes(), abs=1 << 20)
        assert gauge.resident_bytes() == pytest.approx(resident, abs=1 << 20)
        assert peak == pytest.approx(machine.peak_resident_bytes(), abs=1 << 20)
        more.close()
        assert gauge.resident_bytes() < resident - (4 << 20)
    finally:
        gauge.close()


def test_x86_and_memory_without_limits(tmp_path: Path) -> None:
    here = machine.describe(root=build_root(tmp_path, {}))
    assert here.processor == "Some CPU @ 2 GHz"
    assert set(here.instruction_sets) == {"sse4_2", "avx2", "fma", "avx512f", "avx512_vnni"}
    assert (here.memory_bytes, here.available_bytes, here.swap_bytes) == (16 * GIB, 8 * GIB, 2 * GIB)
    assert here.memory_limit_bytes is None


def test_aarch64_is_named_by_its_part(tmp_path: Path) -> None:
    here = machine.describe(root=build_root(tmp_path, {"proc/cpuinfo": ARM}))
    assert "part 0xd4f" in here.processor
    assert set(here.instruction_sets) == {"asimd", "asimddp", "bf16", "i8mm", "sve"}


def test_version_2_limit_of_a_group_above_counts_and_dropped_cache_does_not(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/inner/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/outer/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/outer/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/outer/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
    }
    here = machine.describe(root=build_root(tmp_path, files))
    assert (here.memory_limit_bytes, here.available_bytes) == (4 * GIB, 3 * GIB)


def test_version_1_limit_at_the_mount_of_a_container(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 1024\n",
    }
    here = machine.describe(root=build_root(tmp_path, files))
    assert (here.memory_limit_bytes, here.available_bytes) == (2 * GIB, 2 * GIB - GIB // 2 + 1024)


def test_version_1_without_a_limit_has_a_number_above_all_memory(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
    }
    assert machine.describe(root=build_root(tmp_path, files)).memory_limit_bytes is None


def test_waiting_for_pages_counts_as_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory.high": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    here = machine.describe(root=build_root(tmp_path, files))
    assert (here.memory_limit_bytes, here.available_bytes) == (3 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("files", "swap_bytes"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.swap.max": "0\n"}, 0),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/memory.swap.max": f"{GIB}\n"}, GIB),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.swap.max": "max\n"}, 2 * GIB),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/memory.memsw.limit_in_bytes": f"{5 * GIB}\n",
            },
            GIB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.memsw.limit_in_bytes": "9223372036854771712\n",
            },
            2 * GIB,
        ),
    ],
)
def test_groups_bound_the_swap_space(files: dict[str, str], swap_bytes: int, tmp_path: Path) -> None:
    assert machine.describe(root=build_root(tmp_path, files)).swap_bytes == swap_bytes


def test_caches_are_named_by_level_without_that_of_instructions(tmp_path: Path) -> None:
    found = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "36M")]
    files = {
        f"sys/devices/system/cpu/cpu0/cache/index{number}/{name}": f"{value}\n"
        for number, cache in enumerate(found)
        for name, value in zip(("level", "type", "size"), cache, strict=True)
    }
    caches = machine.describe(root=build_root(tmp_path / "told", files)).cache_bytes
    assert caches == {"L1d": 48 << 10, "L2": 2 << 20, "L3": 36 << 20}
    del files["sys/devices/system/cpu/cpu0/cache/index3/size"]
    assert machine.describe(root=build_root(tmp_path / "partly", files)).cache_bytes.keys() == {"L1d", "L2"}
    assert machine.describe(root=build_root(tmp_path / "untold", {})).cache_bytes == {}


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB + 4096}\n",
    }
    assert machine.describe(root=build_root(tmp_path, files)).available_bytes == 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, 8),
    ],
)
def test_quotas_bound_the_cores(files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.describe(root=build_root(tmp_path, {"proc/self/cgroup": "0::/a\n", **files})).cores == cores


def test_the_peak_sees_memory_that_is_gone_until_it_is_reset() -> None:
    import mmap

    size = 128 << 20
    machine.reset_peak()
    before = machine.resident_bytes()
    with mmap.mmap(-1, size) as block:
        block.write(b"\1" * size)
        assert machine.resident_bytes() >= before + size * 0.95
    peak = machine.peak_resident_bytes()
    assert peak >= before + size * 0.95
    if machine.reset_peak():
        assert machine.peak_resident_bytes() <= peak - size * 0.9


def test_a_peak_that_cannot_be_reset_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.reset_peak() is False


def test_without_the_kernels_high_water_mark_its_own_peak_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", build_root(tmp_path, {"proc/self/status": "VmRSS:\t    2048 kB\n"}))
    assert machine.resident_bytes() == 2048 * 1024
    assert machine.peak_resident_bytes() > 2048 * 1024
