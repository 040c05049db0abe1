"""The checks of `delest doctor`: is everything here that delest needs, and what should be changed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from delest import storage
from delest.hardware import machine
from delest.hardware.frameworks import check_frameworks
from delest.hardware.roofline import known_roofline, measure_roofline
from delest.records.hardware import Check, Diagnosis, Hardware
from delest.units import format_bytes

_GIB = 1 << 30
_LITTLE_MEMORY = _GIB  # torch with its libraries takes about half of it before any model
_LITTLE_DISK = _GIB
_MODULES = {"pillow": "PIL"}  # where the module is not called like the package
# Printed module by module, so that one which kills the process (an instruction this processor lacks) is known.
_IMPORT_EACH = """
import importlib, sys
answers, sys.stdout = sys.stdout, sys.stderr
for name in sys.argv[1:]:
    print(name, end="\\t", file=answers, flush=True)
    try:
        importlib.import_module(name)
        print("ok", file=answers, flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "), file=answers, flush=True)
"""


def diagnose(*, measure: bool = False, clear_cache: bool = False, deep: bool = False) -> Diagnosis:
    """Look at versions, packages, memory, disk, folders and GPUs; takes some seconds, since each package is imported once.

    With `clear_cache` the cache is emptied first; with `measure` the roofline is measured where it is not known, otherwise
    it is shown only where it is. With `deep` each framework that is installed makes a training step on each device that it sees, in a process of its own. Side effects: a file is written into the cache folder and removed again; packages are
    imported in another process. Raises `BadInput` where a cache is to be emptied that cannot be used.
    """
    cleared_bytes = storage.clear_cache() if clear_cache else None
    packages = _check_packages()
    torch_loads = all(check.ok or check.name != "torch" for check in packages)
    here = machine.describe(accelerators=torch_loads)  # a torch that kills its process must not be imported here
    cache = _check_cache()
    able = cache.ok and torch_loads
    return Diagnosis(
        hardware=here,
        versions=find_versions(),
        extras=find_extras(),
        checks=(
            *packages,
            cache,
            *_check_disk(),
            _check_memory(here),
            _check_threads(here),
            *_check_environment(),
            *_check_accelerators(here),
            *(check_frameworks(here) if deep else ()),
        ),
        roofline=(measure_roofline() if measure else known_roofline()) if able else None,
        cleared_bytes=cleared_bytes,
    )


def find_versions() -> dict[str, str]:
    """Versions of Python, the system, delest and every package that it requires or an installed extra brings."""
    found = {"python": platform.python_version(), "system": platform.platform(), "delest": importlib.metadata.version("delest")}
    for name in dict.fromkeys(name for name, _, _ in _requirements()):
        version = _version(name)
        if version is not None:
            found[name] = version
    return found


def find_extras() -> dict[str, bool]:
    """For each optional group of packages whether all of it is installed, recent enough."""
    found: dict[str, bool] = {}
    for name, least, extra in _requirements():
        if extra is not None:
            found[extra] = found.get(extra, True) and _is_recent(_version(name), least)
    return found


def _requirements() -> list[tuple[str, str | None, str | None]]:
    """(package, least version, extra) of each requirement of delest; its own are written as `name>=version` only."""
    found = []
    for line in importlib.metadata.requires("delest") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None, line
        least = re.search(r">=\s*([\d.]+)", requirement)
        extra = re.search(r"extra\s*==\s*[\"']([\w.-]+)[\"']", marker)
        found.append((name[0], least[1] if least else None, extra[1] if extra else None))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_recent(version: str | None, least: str | None) -> bool:
    if version is None or least is None:
        return version is not None
    return _numbers(version) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    """The release part of a version, trailing zeros left out, so that 2.0 equals 2."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _check_packages() -> list[Check]:
    """One check for each required package that is missing, old or does not load; a single one where all are well."""
    required = [(name, least) for name, least, extra in _requirements() if extra is None]
    faults = []
    for name, least in required:
        version = _version(name)
        if not _is_recent(version, least):
            wanted = f"{name}>={least}" if least else name
            found = "not installed" if version is None else f"version {version}, {least} or newer is needed"
            faults.append(Check(name=name, ok=False, detail=found, remedy=f"pip install '{wanted}'", essential=True))
    known = {check.name for check in faults}
    modules = {_MODULES.get(name.lower(), name.lower().replace("-", "_")): name for name, _ in required if name not in known}
    for module, fault in import_faults(list(modules)).items():
        remedy = f"pip install --force-reinstall --no-deps {modules[module]}=={_version(modules[module])}"
        faults.append(Check(name=modules[module], ok=False, detail=fault, remedy=remedy, essential=True))
    if faults:
        return faults
    return [Check(name="packages", ok=True, detail=f"all {len(required)} required ones are installed and load", essential=True)]


def import_faults(modules: list[str], timeout: float = 120.0) -> dict[str, str]:
    """What went wrong when modules were imported one after the other in another process, by module."""
    command = [sys.executable, "-c", _IMPORT_EACH, *modules]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        printed, how = child.stdout, f"ended the process with {_ending(child.returncode)}"
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        how = f"did not load within {timeout:g} s"
    answers = dict(line.split("\t", 1) for line in printed.splitlines() if "\t" in line)
    faults = {module: answer or how for module, answer in answers.items() if answer != "ok"}
    died_at = next((module for module, answer in answers.items() if answer == ""), None)
    if died_at is not None:  # those behind it have not been tried yet
        faults.update(import_faults(modules[modules.index(died_at) + 1 :], timeout))
    return faults


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"


def _check_cache() -> Check:
    try:
        folder = storage.cache_folder()
        probe = folder / f".doctor-{os.getpid()}"
        storage.write_atomic(probe, b"writable?")
        probe.unlink()
    except Exception as error:
        remedy = "set DELEST_CACHE to a folder that you may write, with some room on its disk"
        return Check(name="cache folder", ok=False, detail=str(error), remedy=remedy, essential=True)
    return Check(name="cache folder", ok=True, detail=f"{folder} can be written", essential=True)


def _check_disk() -> list[Check]:
    """Room for runs and for the cache, and whether runs can be written here at all."""
    here = Path.cwd()
    checks = []
    if not os.access(here, os.W_OK):
        checks.append(Check(name="working folder", ok=False, detail=f"{here} cannot be written", remedy="give --out FOLDER"))
    places: dict[str, tuple[Path, str]] = {"disk": (here, "free some space, or write runs to another disk with --out FOLDER")}
    cache = Path(os.environ.get("DELEST_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home())
    places["cache disk"] = (cache, "free some space, or set DELEST_CACHE to a folder on another disk")
    for name, (folder, remedy) in places.items():
        free = storage.free_bytes(folder)
        ok = free >= _LITTLE_DISK
        checks.append(Check(name=name, ok=ok, detail=f"{format_bytes(free)} free in {folder}", remedy=None if ok else remedy))
    return checks


def _check_memory(here: Hardware) -> Check:
    of = f"{format_bytes(here.available_bytes)} of {format_bytes(here.memory_bytes)} available"
    if here.memory_limit_bytes is not None:
        of += f", limited to {format_bytes(here.memory_limit_bytes)} by the control group"
    ok = here.available_bytes >= _LITTLE_MEMORY
    remedy = f"end other programs or raise the limit: torch alone needs about half of {format_bytes(_LITTLE_MEMORY)}"
    return Check(name="memory", ok=ok, detail=of, remedy=None if ok else remedy)


def _check_threads(here: Hardware) -> Check:
    """OMP_NUM_THREADS sets how many threads torch starts, whatever the machine offers."""
    text = os.environ.get("OMP_NUM_THREADS")
    cores = f"{here.cores} usable {'core' if here.cores == 1 else 'cores'}"
    if text is None:
        return Check(name="threads", ok=True, detail=cores)
    first = text.split(",")[0].strip()
    ok = first.isdigit() and 1 <= int(first) <= here.cores
    remedy = f"unset OMP_NUM_THREADS, or set it to {here.cores} or less"
    return Check(name="threads", ok=ok, detail=f"OMP_NUM_THREADS={text} on {cores}", remedy=None if ok else remedy)


def _check_environment() -> list[Check]:
    """Settings that change the speed of libraries; they are somebody's decision, so they are told and not judged."""
    forced = {"OPENBLAS_CORETYPE": "NumPy", "ATEN_CPU_CAPABILITY": "torch"}
    return [
        Check(
            name="environment", ok=True, detail=f"{name}={value} forces the kernels of {whose}, whatever the processor could do"
        )
        for name, whose in forced.items()
        if (value := os.environ.get(name))
    ]


def _check_accelerators(here: Hardware) -> list[Check]:
    if not here.accelerators:
        return [Check(name="gpu", ok=True, detail="none found: training runs on the processor")]
    return [
        Check(
            name="gpu",
            ok=bool(gpu.usable),
            detail=f"{gpu.name}, {format_bytes(gpu.memory_bytes)}{'' if gpu.usable else ', not usable by torch'}",
            remedy=gpu.remedy,
        )
        for gpu in here.accelerators
    ]
