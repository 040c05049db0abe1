"""Bundles timed in a process of their own."""

import numpy as np
import onnx
import pytest

from bundle.networks import image_network, number_network, table_network
from delest import errors
from delest.bundle import load
from delest.bundle.write import write_bundle
from delest.data import fit_preprocessing, open_source
from delest.footprint import latency
from delest.records.latency import Latency


@pytest.fixture
def write(tmp_path):
    """Writes the bundle of a network over data and gives its folder."""

    def make(network, data, **how):
        source = open_source(data, **how)
        onnx.save(network, tmp_path / "network.onnx")
        preprocessing = fit_preprocessing(source, np.arange(len(source)))
        write_bundle(tmp_path / "bundle", tmp_path / "network.onnx", preprocessing, name="test", metric="accuracy")
        return tmp_path / "bundle"

    return make


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2


def test_every_batch_size_gets_a_time_and_a_rate(write, pictures):
    folder = write(image_network(3, 2), pictures)
    measured = latency.measure_bundle(folder, rows=(32, 1, 32), threads=1, seconds=0.05)
    assert isinstance(measured, Latency)
    assert [timing.rows for timing in measured.timings] == [1, 32]
    for timing in measured.timings:
        assert timing.seconds > 0
        assert timing.seconds_spread >= 0
        assert timing.rows_per_second == pytest.approx(timing.rows / timing.seconds)
        assert measured.runtime_bytes < timing.peak_bytes <= measured.peak_bytes
    assert measured.model_bytes == (folder / "model.onnx").stat().st_size
    assert measured.providers == ("CPUExecutionProvider",)
    assert measured.threads == 1


def test_a_large_batch_shows_in_the_peak(write, pictures):
    folder = write(image_network(3, 2), pictures)
    small, large = latency.measure_bundle(folder, rows=(1, 100_000), threads=1, seconds=0.01).timings
    pixels = 100_000 * 8 * 8 * 3
    assert large.peak_bytes - small.peak_bytes > 4 * pixels  # standardised as fp32 inside the graph


def test_the_process_has_no_torch_in_it(write, pictures):
    """Its memory would be counted as the bundle's runtime: torch alone takes more than this."""
    measured = latency.measure_bundle(write(image_network(3, 2), pictures), rows=(1,), threads=1, seconds=0.01)
    assert measured.runtime_bytes < 150 << 20


def test_made_up_rows_are_what_each_kind_of_input_takes(write, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("price,colour,target\n" + "".join(f"{i},{['red', 'blue'][i % 2]},{i * 2}.5\n" for i in range(30)))
    made = latency._made_up_rows(load(write(table_network(1, 1), table, target="target")), 5)
    assert made["price"].dtype == np.float64
    assert set(made["colour"]) == {"red", "blue"}
    assert {len(values) for values in made.values()} == {5}


def test_arrays_are_made_up_too(write):
    numbers = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    measured = latency.measure_bundle(write(number_network(6), (numbers, numbers.sum(1))), rows=(3,), threads=1, seconds=0.01)
    assert [timing.rows for timing in measured.timings] == [3]


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(errors.BadInput, match="is no bundle"):
        latency.measure_bundle(tmp_path)


def test_all_impossible_numbers_are_told_together(tmp_path):
    with pytest.raises(errors.BadInput) as raised:
        latency.measure_bundle(tmp_path, rows=(0, 1.5), threads=0)
    assert len(raised.value.faults) == 3
    with pytest.raises(errors.BadInput, match="no batch size"):
        latency.measure_bundle(tmp_path, rows=())


def test_a_damaged_bundle_is_told_as_such(write, pictures):
    folder = write(image_network(3, 2), pictures)
    with open(folder / "model.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(errors.CheckFailed, match=r"model\.onnx has changed"):
        latency.measure_bundle(folder)
