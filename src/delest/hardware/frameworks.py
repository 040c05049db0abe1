"""Whether PyTorch, TensorFlow and JAX work here, each proven by a tiny training step on every device that it sees, in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from delest.records.hardware import Check, Hardware

_STEP = """
import json, sys, warnings
warnings.filterwarnings("ignore")
answers, sys.stdout = sys.stdout, sys.stderr
import numpy as np
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = x.sum(1, keepdims=True)
found = {"cuda": None, "capabilities": [], "devices": {}}
def tried(name, step):
    try:
        before, after = step()
        found["devices"][name] = None if after < before else f"its loss went from {before:.3g} to {after:.3g}"
    except Exception as error:
        found["devices"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
"""
_SCRIPTS = {
    "torch": """
import torch
found["cuda"] = torch.version.cuda
found["capabilities"] = torch.cuda.get_arch_list() if torch.cuda.is_available() else []
def step(device):
    model = torch.nn.Linear(8, 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    a, b = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    losses = []
    for _ in range(2):
        loss = ((model(a) - b) ** 2).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(float(loss))
    return losses
for name in ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]:
    tried(name, lambda name=name: step(name))
""",
    "tensorflow": """
import tensorflow as tf
built = tf.sysconfig.get_build_info()
found["cuda"] = built.get("cuda_version") if built.get("is_cuda_build") else None
found["capabilities"] = list(built.get("cuda_compute_capabilities") or [])
def step(device):
    with tf.device(device):
        w = tf.Variable(tf.zeros((8, 1)))
        losses = []
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((tf.matmul(x, w) - y) ** 2)
            w.assign_sub(0.05 * tape.gradient(loss, w))
            losses.append(float(loss))
        return losses
for kind in ("CPU", "GPU"):
    for k, _ in enumerate(tf.config.list_physical_devices(kind)):
        tried("cpu" if kind == "CPU" else f"cuda:{k}", lambda kind=kind, k=k: step(f"/{kind}:{k}"))
""",
    "jax": """
import jax, jax.numpy as jnp
loss_of = jax.jit(jax.value_and_grad(lambda w, a, b: jnp.mean((a @ w - b) ** 2)))
def step(device):
    w, a, b = (jax.device_put(value, device) for value in (np.zeros((8, 1), "float32"), x, y))
    losses = []
    for _ in range(2):
        loss, slope = loss_of(w, a, b)
        w = w - 0.05 * slope
        losses.append(float(loss))
    return losses
for device in [*jax.devices("cpu"), *(one for one in jax.devices() if one.platform != "cpu")]:
    if device.platform != "cpu":
        found["cuda"] = getattr(device.client, "platform_version", "").strip() or None
    tried("cpu" if device.platform == "cpu" else f"cuda:{device.id}", lambda device=device: step(device))
""",
}
# What a build for NVIDIA's GPUs is installed by, and the driver that it needs: the frameworks' own pages, https://www.tensorflow.org/install/pip and
# https://docs.jax.dev/en/latest/installation.html; torch's is told by `accelerators`, which knows its builds.
_INSTALL = {
    "tensorflow": "pip uninstall tensorflow-cpu; pip install 'tensorflow[and-cuda]' (a driver of 525 or newer)",
    "jax": "pip install -U 'jax[cuda12]' (a driver of 525 or newer; 'jax[cuda13]' wants 580)",
    "torch": "see the check gpu",
}
_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "jax": ("jax",), "torch": ("torch",)}


def check_frameworks(here: Hardware, timeout: float = 180.0) -> list[Check]:
    """A check for each framework that is installed: what its build is for, and what a training step did on each of its devices."""
    return [
        _judge(name, _proof(script, timeout), here)
        for name, script in _SCRIPTS.items()
        if importlib.util.find_spec(name) is not None
    ]


def _proof(script: str, timeout: float) -> Mapping[str, Any] | str:
    """What a script found, or how its process ended."""
    try:
        code = _STEP + script + "\nprint(json.dumps(found), file=answers, flush=True)"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"a training step did not end within {timeout:g} s"
    try:
        found: Mapping[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
        return found
    except (ValueError, IndexError):
        said = [line for line in child.stderr.strip().splitlines() if line.strip()]
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
        return f"its process ended with {how}{': ' + said[-1][:160] if said else ''}"


def _judge(name: str, proof: Mapping[str, Any] | str, here: Hardware) -> Check:
    version = _version(name)
    if isinstance(proof, str):
        return Check(
            name=name, ok=False, detail=f"{version}: {proof}", remedy=f"pip install --force-reinstall {name}=={version}"
        )
    devices: Mapping[str, str | None] = proof["devices"]
    failed = {device: why for device, why in devices.items() if why is not None}
    built = f"built for CUDA {proof['cuda']}" if proof["cuda"] else "built for processors alone, or sees no GPU"
    for_what = f" ({', '.join(proof['capabilities'])})" if proof["capabilities"] else ""
    worked = [device for device in devices if device not in failed]
    detail = f"{version}, {built}{for_what}; a training step works on {', '.join(worked) or 'nothing'}"
    if failed:
        whys = "; ".join(f"{device}: {why}" for device, why in failed.items())
        return Check(name=name, ok=False, detail=f"{detail}, not on {whys}", remedy=_INSTALL[name])
    unseen = bool(here.accelerators) and not any(device.startswith("cuda") for device in devices)
    if unseen:
        gpus = ", ".join(gpu.name for gpu in here.accelerators)
        return Check(name=name, ok=False, detail=f"{detail}, and it does not use {gpus}", remedy=_INSTALL[name])
    return Check(name=name, ok=True, detail=detail)


def _version(name: str) -> str:
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
