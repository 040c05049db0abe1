import numpy as np
import onnx
import pytest
from onnx_networks import quantize, random_weights, run, save, save_dense, squared_error

from delest import errors
from delest.shrinking import qdq
from delest.shrinking.calibration import Activations, min_max
from delest.shrinking.quantize import best_static
from delest.shrinking.sensitivity import rank_layers

RANDOM = np.random.default_rng(0)


def rows(count, width):
    return RANDOM.normal(size=(count, width)).astype(np.float32)


def batches_of(x, size=64):
    return lambda: ({"x": x[k : k + size]} for k in range(0, len(x), size))


def test_an_outlier_is_clipped_where_that_does_better(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(64, 64, 32, 8))
    x, selection = rows(1024, 64), rows(256, 64)
    x[5, 5] = 500
    judge = squared_error(network, {"x": selection})
    form = best_static(network, batches_of(x), tmp_path / "int8.onnx", reduce_range=True, judge=judge)
    assert form.ranges in ("percentile", "entropy")
    assert list(form.scores) == ["min_max", "percentile", "entropy"]
    assert form.scores["min_max"] < 4 * form.score  # four times the squared error, at least
    assert form.score == form.scores[form.ranges] == pytest.approx(judge(tmp_path / "int8.onnx"))
    assert form.int8 == ["0", "1", "2"]
    assert form.left_float == []
    plain = quantize(network, list(batches_of(x)()), tmp_path / "plain.onnx")
    assert plain == form.int8
    assert judge(tmp_path / "plain.onnx") == pytest.approx(form.scores["min_max"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx", "plain.onnx"]


def test_the_judge_decides_between_equals_and_hates_no_number(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(8, 8, 4))
    answers = iter([float("nan"), 1.0, 1.0])
    form = best_static(
        network, batches_of(rows(64, 8)), tmp_path / "int8.onnx", reduce_range=True, judge=lambda _: next(answers)
    )
    assert form.ranges == "percentile"
    assert form.scores["min_max"] == -np.inf


def fragile(path):
    """Eight layers, of which `4` has weights of 100 on an input that is always zero: steps that fit them round all others away."""
    weights = random_weights(16, *[32] * 7, 4)
    weights[3][0] = 0
    weights[4][:, 0] = 100
    return save_dense(path, *weights)


def test_the_sensitive_layer_is_left_in_float(tmp_path):
    network = fragile(tmp_path / "fp32.onnx")
    x, selection = rows(256, 16), rows(256, 16)
    judged = []

    def judge(path):
        judged.append(squared_error(network, {"x": selection})(path))
        return judged[-1]

    power = float(np.square(run(network, {"x": selection})).mean())
    options = {"reduce_range": True, "judge": judge}
    bad = best_static(network, batches_of(x), tmp_path / "bad.onnx", **options)
    assert bad.score < -0.2 * power
    assert bad.int8 == [str(layer) for layer in range(8)]
    judged.clear()
    form = best_static(network, batches_of(x), tmp_path / "int8.onnx", allowed=0.02 * power, **options)
    assert form.left_float == ["4"]
    assert form.int8 == [str(layer) for layer in range(8) if layer != 4]
    assert form.score > -0.02 * power
    assert form.score == pytest.approx(judge(tmp_path / "int8.onnx"))
    assert len(judged) == 3 + 1 + 2 + 1  # ranges, the float network, two layers left and one, and the line above
    kept = {weight.name for weight in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert "network.4.weight" in kept
    assert "network.3.weight" not in kept


def test_at_most_a_quarter_of_the_layers_is_left(tmp_path):
    network = fragile(tmp_path / "fp32.onnx")
    judge = squared_error(network, {"x": rows(64, 16)})
    form = best_static(network, batches_of(rows(256, 16)), tmp_path / "int8.onnx", reduce_range=True, judge=judge, allowed=0.0)
    assert form.left_float[0] == "4"
    assert len(form.left_float) <= 2
    assert form.score > max(form.scores.values())


def test_layers_are_ranked_by_what_they_do_to_the_outputs(tmp_path):
    model = qdq.prepare(fragile(tmp_path / "fp32.onnx"), tmp_path)
    x = rows(128, 16)
    ranges = min_max(Activations(model, qdq.activations(model)), [{"x": x}])
    ranked = rank_layers(model, ranges, {"x": x}, reduce_range=True)
    assert ranked[0][0] == "node4"
    assert ranked[0][1] > 10 * ranked[1][1] > 0
    assert sorted(name for name, _ in ranked) == [f"node{layer}" for layer in range(8)]


def test_no_calibration_rows_are_refused(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(8, 4))
    with pytest.raises(errors.BadInput, match="at least one calibration batch"):
        quantize(network, [], tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_network_without_layers_stays_float(tmp_path):
    network = save(
        tmp_path / "fp32.onnx",
        [onnx.helper.make_node("Tanh", ["x"], ["output"])],
        {},
        {"x": (["batch", 4],)},
        {"output": (["batch", 4],)},
    )
    form = best_static(
        network, batches_of(rows(8, 4)), tmp_path / "int8.onnx", reduce_range=True, judge=lambda _: 0.0, allowed=0.0
    )
    assert form.int8 == form.left_float == []
