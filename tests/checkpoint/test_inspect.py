"""The report on a folder, from headers alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dsv3.checkpoint.inspect import inspect_checkpoint, print_report
from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.config import ModelConfig, RopeScaling
from dsv3.model.transformer import Transformer
from tests.checkpoint.helpers import CONFIGS, read_folder


def test_figures_are_those_of_the_tensors(fp8_folder: Path) -> None:
    report = json.loads(json.dumps(inspect_checkpoint(fp8_folder)))
    tensors = read_folder(fp8_folder)
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(group["count"] for group in report["tensors"]) == len(tensors)
    assert {name: figures["bytes"] for name, figures in report["dtypes"].items()} == {
        short: sum(t.nbytes for t in tensors.values() if str(t.dtype) == f"torch.{long}")
        for short, long in (("F8_E4M3", "float8_e4m3fn"), ("BF16", "bfloat16"), ("F32", "float32"))
    }
    config = CONFIGS["v3-blocks"]
    experts = next(g for g in report["tensors"] if g["name"] == "model.layers.*.mlp.experts.*.up_proj.weight")
    assert experts["count"] == 3 * config.n_routed_experts and experts["dtype"] == "F8_E4M3"
    assert experts["shape"] == [config.moe_intermediate_size, config.hidden_size]
    assert (report["missing"], report["unexpected"], report["mismatched"]) == ([], [], [])
    assert ModelConfig(**report["config"]) == config


def test_parameters_are_those_of_the_model(folder: Path, make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    report = inspect_checkpoint(folder)
    assert report["parameters"]["mtp"] == sum(n for name, n in sizes.items() if name.startswith("mtp."))
    assert sum(report["parameters"].values()) == sum(sizes.values())


def test_no_tensor_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckpointReader, name: str, rows: slice) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointReader, "tensor", refuse)
    assert inspect_checkpoint(folder)["shards"] == len(list(folder.glob("*.safetensors")))


def test_the_table_says_what_the_report_says(folder: Path) -> None:
    report = inspect_checkpoint(folder)
    report["missing"] = ["model.layers.9.lost.weight"]
    report["mismatched"] = [{"name": "lm_head.weight", "expected": [2, 3], "found": [3, 2]}]
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "model.layers.*.mlp.experts.*.down_proj.weight",
        "64 x 32",
        "BF16",
        "1 missing: model.layers.9.lost.weight",
    ):
        assert words in text
    assert "lm_head.weight: expected [2, 3], found [3, 2]" in text
    assert f"{report['bytes']:,} bytes" in text


def test_yarn_is_in_the_report(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    save_pretrained(make_model("v3-yarn-2mtp"), tmp_path / "m")
    scaling = inspect_checkpoint(tmp_path / "m")["config"]["rope_scaling"]
    assert RopeScaling(**scaling) == CONFIGS["v3-yarn-2mtp"].rope_scaling
