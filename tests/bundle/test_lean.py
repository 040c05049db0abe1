import numpy as np
import onnx
from networks import image_network, run_network
from onnx import TensorProto, helper, numpy_helper

from delest.bundle.lean import make_lean


def test_names_become_short_and_answers_stay():
    network = onnx.shape_inference.infer_shapes(image_network(3, 2))
    network.graph.node[0].metadata_props.add(key="module", value="a.long.path")
    network.graph.node[0].doc_string = "where it was made"
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    before, size = run_network(network, x), network.ByteSize()
    make_lean(network)
    onnx.checker.check_model(network, full_check=True)
    np.testing.assert_array_equal(run_network(network, x), before)
    assert network.ByteSize() < 0.7 * size
    assert not network.graph.value_info
    assert [value.name for value in (*network.graph.input, *network.graph.output)] == ["x", "output"]
    assert all(not node.name and not node.doc_string and not node.metadata_props for node in network.graph.node)
    assert {len(weight.name) for weight in network.graph.initializer} == {1}


def test_branches_see_the_names_outside_them():
    scalar = helper.make_tensor_value_info("branch_result", TensorProto.FLOAT, None)
    branches = {
        name: helper.make_graph([helper.make_node(kind, ["input_value", "factor"], ["branch_result"])], name, [], [scalar])
        for name, kind in (("then_branch", "Mul"), ("else_branch", "Add"))
    }
    branches["else_branch"].node[0].output[0] = branches["else_branch"].output[0].name = "other_result"
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["input_value"], ["total"], keepdims=0),
            helper.make_node("Greater", ["total", "factor"], ["is_large"]),
            helper.make_node("If", ["is_large"], ["a"], **branches),
        ],
        "main",
        [helper.make_tensor_value_info("input_value", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(3), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    make_lean(model)
    for values, expected in (([1.0, 1.0], [4.0, 4.0]), ([2.0, 2.0], [6.0, 6.0])):
        assert run_network(model, {"input_value": np.array(values, np.float32)}).tolist() == expected
