from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from delest import storage
from delest.hardware import doctor, machine
from delest.records.form import from_json, to_json
from delest.records.hardware import Accelerator, Check, Diagnosis, Roofline

REQUIRES = ["torch>=2.11", "numpy>=2.0", "Pillow>=11", 'fancy>=3; extra == "fancy"', "numpy>=99; extra == 'newer'"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, as a mapping that a test may change; nothing is imported."""
    versions = {"torch": "2.13.0+cpu", "numpy": "2", "pillow": "11.0", "delest": "0.1.0"}

    def version(name: str) -> str:
        if name.lower() not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.lower()]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(doctor, "import_faults", lambda modules: {})
    return versions


def named(checks: list[Check] | tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine_is_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    diagnosis = doctor.diagnose()
    assert diagnosis.usable
    assert named(diagnosis.checks, "packages").ok
    assert {"python", "delest", "torch", "numpy", "onnxruntime", "polars"} <= set(diagnosis.versions)
    assert diagnosis.extras.keys() >= {"keras", "openvino", "dev"}
    assert all(check.remedy for check in diagnosis.checks if not check.ok)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert from_json(Diagnosis, to_json(diagnosis)) == diagnosis


def test_versions_and_extras_come_from_the_packages_own_list(installed: dict[str, str]) -> None:
    assert doctor.find_extras() == {"fancy": False, "newer": False}
    installed["fancy"] = "3.0.1"
    assert doctor.find_extras() == {"fancy": True, "newer": False}
    assert doctor.find_versions()["fancy"] == "3.0.1"


def test_missing_and_old_packages_are_faults_with_the_command_that_mends_them(installed: dict[str, str]) -> None:
    del installed["numpy"]
    installed["torch"] = "2.9.1"
    checks = {check.name: check for check in doctor._check_packages()}
    assert checks.keys() == {"torch", "numpy"}
    assert checks["torch"].remedy == "pip install 'torch>=2.11'"
    assert "2.9.1" in checks["torch"].detail
    assert all(check.essential and not check.ok for check in checks.values())


def test_a_package_that_does_not_load_is_a_fault(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_faults", lambda modules: {"PIL": "ImportError: libjpeg.so"} if "PIL" in modules else {})
    (check,) = doctor._check_packages()
    assert (check.name, check.ok, check.essential) == ("Pillow", False, True)
    assert check.remedy == "pip install --force-reinstall --no-deps Pillow==11.0"


def test_imports_that_fail_or_kill_the_process_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound.py").write_text("print('hello')\n")
    (tmp_path / "raises.py").write_text("raise OSError('no such\\nlibrary')\n")
    (tmp_path / "kills.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    faults = doctor.import_faults(["sound", "raises", "kills", "missing_here"])
    assert faults == {
        "raises": "OSError: no such library",
        "kills": "ended the process with signal 4",
        "missing_here": "ModuleNotFoundError: No module named 'missing_here'",
    }
    assert doctor.import_faults(["hangs"], timeout=1.0) == {"hangs": "did not load within 1 s"}


def test_a_cache_folder_that_cannot_be_made_is_essential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor._check_cache()
    assert (check.ok, check.essential) == (False, True)
    assert "DELEST_CACHE" in (check.remedy or "")


def test_the_cache_is_emptied_and_the_roofline_measured_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    (storage.cache_folder("packed") / "old.bin").write_bytes(b"x" * 1000)
    known = Roofline(device="x", flops={}, reused_bytes=1, fresh_bytes=1, cached_bytes=1, overhead_seconds=1)
    monkeypatch.setattr(doctor, "measure_roofline", lambda: known)
    installed.update(pillow="11.1", numpy="2.1")
    plain = doctor.diagnose()
    assert (plain.roofline, plain.cleared_bytes) == (None, None)
    done = doctor.diagnose(measure=True, clear_cache=True)
    assert (done.roofline, done.cleared_bytes) == (known, 1000)
    assert not any((tmp_path / "packed").iterdir())
    assert from_json(Diagnosis, to_json(done)) == done


def test_an_unusable_cache_is_a_failed_check_and_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "file" / "cache"))
    diagnosis = doctor.diagnose(measure=True)
    assert not diagnosis.usable
    assert diagnosis.roofline is None


def test_little_disk_and_memory_are_told_but_do_not_make_it_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 5 << 20)
    checks = doctor._check_disk()
    assert [check.name for check in checks if not check.ok] == ["disk", "cache disk"]
    here = machine.describe()
    poor = doctor._check_memory(type(here)(**{**vars(here), "available_bytes": 1 << 20, "memory_limit_bytes": 1 << 29}))
    assert not poor.ok
    assert "1 MiB" in poor.detail
    assert "512 MiB by the control group" in poor.detail
    assert not any(check.essential for check in (*checks, poor))
    assert all(check.remedy for check in (*checks, poor))


@pytest.mark.parametrize(("value", "ok"), [("1", True), ("64", False), ("0", False), ("many", False), ("1,2", True)])
def test_the_number_of_threads_is_checked(value: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    here = machine.describe()
    check = doctor._check_threads(type(here)(**{**vars(here), "cores": 4}))
    assert check.ok is ok
    assert ok or "unset OMP_NUM_THREADS" in (check.remedy or "")


def test_forced_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    (check,) = doctor._check_environment()
    assert check.ok
    assert "OPENBLAS_CORETYPE=Haswell" in check.detail


def test_a_gpu_that_torch_cannot_use_is_a_fault_that_leaves_the_processor() -> None:
    gpu = Accelerator(name="GPU", memory_bytes=8 << 30, remedy="pip install something")
    here = machine.describe()
    (check,) = doctor._check_accelerators(type(here)(**{**vars(here), "accelerators": (gpu,)}))
    assert (check.ok, check.essential, check.remedy) == (False, False, "pip install something")
