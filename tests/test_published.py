"""The benchmark of published measurements: rows as loops, factors of devices, the table in the document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_files import load

published, published_rows = load("published"), load("published_rows")
models, convnets, optimizers = load("published_models"), load("published_convnets"), load("published_optimizers")

FIELDS = (
    "row gpu model layers hidden heads kv_heads ffn vocab seq_len image_size batch_per_gpu grad_accum precision optimizer act_ckpt "
    "compile attn framework mem_kind mem_gib step_time_s step_time_basis mem_grade time_grade notes workload source_repo n_gpus"
)


def row(**known: str) -> dict[str, str]:
    return {**dict.fromkeys(FIELDS.split(" "), ""), "row": "2", "gpu": "A100-SXM4-80GB", "n_gpus": "1", **known}


def parameters(model: torch.nn.Module, *, trained: bool = False) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trained)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet18", 11.69),
        ("resnet50", 25.56),
        ("resnext50_32x4d", 25.03),
        ("wide_resnet50_2", 68.88),
        ("mobilenetv3_large_100", 5.48),
        ("convnext_tiny", 28.59),
        ("densenet121", 7.98),
        ("vgg16", 138.36),
    ],
)
def test_convnets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert parameters(convnets.CONVNETS[name]()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_transformers_have_the_published_number_of_parameters() -> None:
    llama = models.GPTShape(layers=32, width=4096, heads=32, groups=32, hidden=11008, vocabulary=32000, gated=True, rank=8)
    tiny = models.GPTShape(layers=22, width=2048, heads=32, groups=4, hidden=5632, vocabulary=32000, gated=True)
    with torch.device("meta"):
        model = models.GPT(llama, 16)
        assert parameters(model, trained=True) == 4_194_304
        assert parameters(model) == 6_738_415_616 + 4_194_304
        assert parameters(models.GPT(tiny, 16)) == 1_100_048_384
        small = models.VisionTransformer(384, 12, 6, 1536, image=224, patch=16, classes=1000)
        assert parameters(small) / 1e6 == pytest.approx(22.05, abs=0.005)


@pytest.mark.parametrize(("bits", "block"), [(8, 2048), (4, 128)])
def test_quantized_states_take_their_bits_and_a_scale_a_block(bits: int, block: int) -> None:
    large, small = (torch.nn.Parameter(torch.zeros(count)) for count in (8192, 100))
    optimizer = optimizers.QuantizedAdamW([large, small], bits=bits, block=block)
    for parameter in (large, small):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sizes = [sum(one.untyped_storage().nbytes() for one in optimizer.state[which].values()) for which in (large, small)]
    assert sizes == [2 * (8192 * bits // 8 + 4 * 8192 // block), 2 * 4 * 100]


def test_an_operator_keeps_gradients_and_the_graph() -> None:
    """Llama's perceptron at the row's own dimensions is known to a hundredth of a per cent."""
    told = row(
        model="OPERATOR Llama MLP (SwiGLU)",
        hidden="4096",
        ffn="11008",
        seq_len="1024",
        batch_per_gpu="4",
        precision="bf16",
        framework="Liger 0.2.1 bench",
        mem_kind="torch max_memory_allocated",
        mem_gib=str(1294.25 / 1024),
        mem_grade="A (operator)",
    )
    found = published.predict(told, [told])
    assert found["group"] == "operator"
    assert abs(found["bytes_error"]) < 1e-4


def test_rows_that_lack_a_field_are_told_with_it() -> None:
    told = row(model="resnet18", precision="fp32", optimizer="SGD", mem_grade="A")
    assert published.predict(told, [told])["missing"] == ["batch_per_gpu"]


def timed(device: str, predicted: float, published_seconds: float) -> dict[str, Any]:
    return {"device": device, "plain_seconds": predicted, "published_seconds": published_seconds}


def test_a_factor_is_set_by_the_first_two_rows_and_counted_on_the_others() -> None:
    rows = [timed("a", 1.0, 2.0), timed("b", 1.0, 3.0), timed("a", 1.0, 8.0), timed("a", 2.0, 4.0)]
    once = published.apply_factors(rows)
    assert [one["sets_the_factor"] for one in once] == [True, True, True, False]
    assert once[3]["factor"] == pytest.approx(4.0)
    assert once[3]["predicted_seconds"] == pytest.approx(8.0)
    assert once[3]["seconds_error"] == pytest.approx(1.0)
    assert published.apply_factors(once) == once


def test_versions_of_pytorch_are_read_from_the_row() -> None:
    assert published_rows.torch_version(row(framework="HF Trainer / PyTorch 1.10 era")) == (1, 10)
    assert published_rows.torch_version(row(framework="PyTorch 2.4.0.dev20240427+cu121")) == (2, 4)
    assert published_rows.torch_version(row(framework="NGC PyTorch 21.03")) == (1, 10)


def test_the_table_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "published.md"
    path.write_text(f"before\n{published.BEGIN}\nold\n{published.END}\nafter\n")
    told = {"row": "line 2: net, fp32, batch 4", "line": 2, "device": "x", "group": "operator", "checkpoints": ""}
    one = {**told, "predicted_bytes": 2**30, "published_bytes": 2**31, "bytes_error": -0.5}
    published.write_table([one, {**told, "missing": ["batch_per_gpu"]}], path)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 1.00 | 2.00 | -50.0% |" in text
    assert "no batch_per_gpu" in text
