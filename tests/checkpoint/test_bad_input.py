"""Folders that are not what they should be: one clear error, before anything is built or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.inspect import inspect_checkpoint
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.errors import UserError
from tests.checkpoint.helpers import edit_shard

INDEX = "model.safetensors.index.json"


def refused(folder: Path, *words: str, by_inspect: bool = True) -> None:
    """Loading, converting (and inspecting) raise one line that has all `words`; converting leaves nothing behind."""
    target = folder.parent / "out" / "converted"
    target.parent.mkdir(exist_ok=True)
    attempts: list[Callable[[], Any]] = [lambda: load_pretrained(folder), lambda: convert(folder, target)]
    if by_inspect:
        attempts.append(lambda: inspect_checkpoint(folder))
    for attempt in attempts:
        with pytest.raises(UserError) as error:
            attempt()
        message = str(error.value)
        assert all(word in message for word in words), message
        assert "\n" not in message and len(message) < 600, message
    assert not list(target.parent.iterdir())


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(keep: int, folder: Path) -> None:
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, shard.name, "truncated")


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    reader = CheckpointReader(folder)
    name = max(reader, key=lambda name: reader.info(name).offset)
    file = folder / reader.info(name).shard
    assert reader.tensor(name).numel()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"cut short since it was opened: {name}"):
        reader.tensor(name)
    file.unlink()
    with pytest.raises(UserError, match=f"cannot read {name} from .*{file.name}: No such file"):
        reader.tensor(name)


def test_missing_shard(folder: Path) -> None:
    shard = shards(folder)[-1]
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_garbage_shard(folder: Path, seed: int) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(seed.to_bytes(8, "big") * 100)
    refused(folder, shard.name, "no safetensors file")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/elsewhere/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "pickle.bin", "", 7],
)
def test_a_shard_that_is_no_file_name(name: Any, folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder.parent / "outside.safetensors")
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    refused(folder, INDEX, "lm_head.weight", repr(name))


def test_an_index_that_is_wrong_about_a_shard(folder: Path) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": shards(folder)[0].name}))
    refused(folder, shards(folder)[0].name, "lacks model.norm.weight")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles(name: str, folder: Path) -> None:
    for shard in (*shards(folder), folder / INDEX):
        shard.unlink()
    (folder / name).write_bytes(b"\x80\x04N.")
    refused(folder, name, "pickle")


def test_no_weights_and_no_folder(folder: Path, tmp_path: Path) -> None:
    for shard in (*shards(folder), folder / INDEX):
        shard.unlink()
    refused(folder, "neither", INDEX)
    refused(tmp_path / "nowhere", "nowhere")


def test_missing_tensors(folder: Path) -> None:
    def drop(weight_map: dict[str, str]) -> None:
        for name in [name for name in weight_map if "layers.2.mlp.experts" in name]:
            del weight_map[name]

    edit_index(folder, drop)
    refused(folder, "24 missing", "model.layers.2.mlp.experts.0.down_proj.weight", "and 19 more", by_inspect=False)
    assert len(inspect_checkpoint(folder)["missing"]) == 24


def test_unexpected_tensors(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # harmless: follows from the config

    edit_shard(folder, add)
    name = shards(folder)[0].name
    edit_index(folder, lambda m: m.update({"model.layers.0.self_attn.rotary_emb.inv_freq": name}))
    load_pretrained(folder)
    edit_index(folder, lambda m: m.update({"model.layers.0.self_attn.q_proj.bias": name}))
    refused(folder, "1 unexpected: model.layers.0.self_attn.q_proj.bias", by_inspect=False)
    assert inspect_checkpoint(folder)["unexpected"] == ["model.layers.0.self_attn.q_proj.bias"]


def test_a_shape_mismatch(folder: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()

    edit_shard(folder, transpose)
    refused(folder, "model.layers.0.mlp.up_proj.weight (expected [96, 64], found [64, 96])", by_inspect=False)
    (entry,) = inspect_checkpoint(folder)["mismatched"]
    assert entry == {"name": "model.layers.0.mlp.up_proj.weight", "expected": [96, 64], "found": [64, 96]}


def test_another_models_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 320', '"vocab_size": 321'))
    refused(folder, "model.embed_tokens.weight (expected [321, 64], found [320, 64])", by_inspect=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(bad: float, fp8_folder: Path) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1, 0] = bad

    edit_shard(fp8_folder, spoil)
    refused(fp8_folder, name, "NaN or infinite", by_inspect=False)
    with pytest.raises(UserError, match="NaN or infinite"):
        convert(fp8_folder, fp8_folder.parent / "copy", fp8=True)  # also where the payload is only copied


def test_scales_that_are_missing_or_misshapen(fp8_folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].reshape(1, 4)

    edit_shard(fp8_folder, reshape)
    refused(fp8_folder, f"{name} (expected [2, 2], found [1, 4])", by_inspect=False)
    edit_index(fp8_folder, lambda weight_map: weight_map.pop(name))
    refused(fp8_folder, f"1 missing: {name}", by_inspect=False)


def test_scales_beside_weights_that_are_not_fp8(fp8_folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.bfloat16)

    edit_shard(fp8_folder, widen)
    refused(fp8_folder, f"1 unexpected: {name}_scale_inv", by_inspect=False)


def test_weights_that_are_integers(folder: Path) -> None:
    def to_int8(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    edit_shard(folder, to_int8)
    refused(folder, "model.layers.0.mlp.up_proj.weight has dtype I8", by_inspect=False)
