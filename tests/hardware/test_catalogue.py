from __future__ import annotations

import pytest

from delest import errors
from delest.hardware import catalogue
from delest.records.form import from_json, to_json
from delest.records.hardware import Device

FORMATS = {"fp32", "tf32", "fp16", "bf16", "fp64"}


@pytest.mark.parametrize("device", catalogue.DEVICES.values(), ids=list(catalogue.DEVICES))
def test_every_device_is_complete_and_plausible(device: Device) -> None:
    assert catalogue.find_device(device.name) is device
    assert catalogue.find_device(device.title.partition(",")[0]) is device
    assert device.source.startswith("https://")
    assert 8 << 30 <= device.memory_bytes <= 1 << 38
    assert 1e11 <= device.bandwidth_bytes <= 1e13
    assert {"fp32", "fp16"} <= device.flops.keys() <= FORMATS
    assert device.flops["fp16"] >= 2 * device.flops["fp32"]  # a rate for fp16 without matrix units would be no more
    assert device.flops.get("bf16", device.flops["fp16"]) == device.flops["fp16"]
    assert (device.capability is None) == device.title.startswith("AMD")
    assert device.capability is None or ("bf16" in device.flops) == (float(device.capability) >= 8)
    assert from_json(Device, to_json(device)) == device


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("V100-SXM2-16GB", "v100-16"),
        ("V100", "v100-16"),
        ("V100-32GB", "v100-32"),
        ("A100-SXM4-40GB", "a100-40"),
        ("A100-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("RTX4070TiSUPER", "rtx4070tisuper"),
        ("rtx 4070 ti super", "rtx4070tisuper"),
        ("RTX3090", "rtx3090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3060 12 GB", "rtx3060"),
        ("QuadroRTX8000", "quadrortx8000"),
        ("RTXA6000", "rtxa6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("Tesla T4", "t4"),
        ("H100-PCIe-80GB", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100-SXM5-80GB", "h100"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_are_read_as_people_and_drivers_write_them(name: str, found: str) -> None:
    assert catalogue.find_device(name).name == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a1000", r"unknown device 'a1000': did you mean a100-\d0 or a100-\d0\? Known: .*rtx3090.*mi300x"),
        ("h1000", "did you mean h100"),
        ("A100-SXM4-64GB", "did you mean a100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", r"did you mean rtx4090\? "),
        ("", r"unknown device ''\. Known: "),
        ("000", "Known: "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(errors.BadInput, match=words):
        catalogue.find_device(name)


def test_printed_rates_are_dense() -> None:
    printed_with_sparsity = {"h100": 1979e12, "h100-pcie": 1513e12, "l4": 242e12, "b200": 4500e12}
    for name, rate in printed_with_sparsity.items():
        assert catalogue.DEVICES[name].flops["bf16"] == pytest.approx(rate / 2)


def test_a_roofline_is_the_datasheet_at_its_efficiencies() -> None:
    a100 = catalogue.find_device("a100-40")
    reached = catalogue.roofline_of(a100, matmul=0.5, convolution=0.25, memory=0.9, overhead_seconds=5e-6)
    assert reached.flops["matmul.bf16"] == pytest.approx(156e12)
    assert reached.flops["matmul.fp32"] == pytest.approx(0.5 * 19.5e12)
    assert reached.flops["convolution.fp32"] == pytest.approx(0.25 * 156e12)  # TF32, as PyTorch does unless told otherwise
    assert reached.flops["depthwise.fp16"] <= 19.5e12
    assert reached.reused_bytes == reached.fresh_bytes == pytest.approx(0.9 * 1555e9)
    assert (reached.basis, reached.overhead_seconds) == ("datasheet", 5e-6)
    assert a100.source in reached.source
    assert "matmul 50%" in reached.source
    assert reached.flops.keys() == {
        f"{kind}.{name}" for kind in ("matmul", "convolution", "depthwise", "attention") for name in a100.flops
    }


def test_without_tf32_convolutions_have_the_fp32_rate() -> None:
    reached = catalogue.roofline_of(catalogue.find_device("v100"), convolution=1.0)
    assert reached.flops["convolution.fp32"] == pytest.approx(15.7e12)
    assert "matmul.bf16" not in reached.flops


def test_efficiencies_that_cannot_be_are_reported_together() -> None:
    with pytest.raises(errors.BadInput, match="3 faults") as raised:
        catalogue.roofline_of(catalogue.find_device("t4"), matmul=70, memory=0.0, overhead_seconds=-1.0)
    assert "matmul=70 is no efficiency: give more than 0, at most 1" in str(raised.value)
