"""Folder to folder: dtypes and FP8, one tensor at a time, and the check that the function is still the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint import encoding
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.names import CanonicalTensor
from dsv3.checkpoint.pretrained import load_pretrained, save_pretrained
from dsv3.checkpoint.source import Checkpoint, Stored
from dsv3.checkpoint.verify import verify
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.ops.fp8 import dequantize_blocks
from tests.checkpoint.helpers import edit_shard, read_folder, same

MakeModel = Callable[..., Transformer]


@pytest.mark.parametrize("kind", ["folder", "fp8_folder"])
def test_nothing_changes_unless_asked(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """HF to HF, bit by bit; FP8 payloads and scales too."""
    source: Path = request.getfixturevalue(kind)

    def loosen(tensors: dict[str, torch.Tensor]) -> None:
        """Scales as another quantiser may choose them, which no second quantisation would find again."""
        for name in tensors:
            if name.endswith("_scale_inv"):
                weight = name.removesuffix("_scale_inv")
                tensors[weight] = (tensors[weight].float() * 0.7).to(torch.float8_e4m3fn)
                tensors[name] *= 1.3

    edit_shard(source, loosen)
    convert(source, tmp_path / "b", fp8=kind == "fp8_folder", max_shard_bytes=50_000)
    a, b = read_folder(source), read_folder(tmp_path / "b")
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert (source / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_is_unpacked(dtype: torch.dtype | None, fp8_folder: Path, tmp_path: Path) -> None:
    convert(fp8_folder, tmp_path / "b", dtype=dtype)
    a, b = read_folder(fp8_folder), read_folder(tmp_path / "b")
    assert b.keys() == {name for name in a if not name.endswith("_scale_inv")}
    for name, tensor in b.items():
        wide = dequantize_blocks(a[name], a[name + "_scale_inv"]) if name + "_scale_inv" in a else a[name]
        expected = torch.float32 if "e_score" in name else dtype or torch.bfloat16
        assert same(tensor, wide.to(expected)), name
    assert "quantization_config" not in (tmp_path / "b" / "config.json").read_text()


def test_conversion_equals_saving_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("v3-blocks")
    save_pretrained(model, tmp_path / "fp32")
    save_pretrained(model, tmp_path / "saved", dtype=torch.bfloat16, fp8=True)
    convert(tmp_path / "fp32", tmp_path / "converted", dtype=torch.bfloat16, fp8=True)
    a, b = read_folder(tmp_path / "saved"), read_folder(tmp_path / "converted")
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_a_folder_may_be_converted_onto_itself(folder: Path) -> None:
    before = read_folder(folder)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(folder, folder, dtype=torch.float32)
    convert(folder, folder, dtype=torch.float32, overwrite=True)
    after = read_folder(folder)
    assert all(same(after[name], before[name].float()) for name in before)


def test_tokenizer_files_come_along_and_code_does_not(folder: Path, tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling_deepseek.py",
        "notes.txt",
    ):
        (folder / name).write_text(name)
    convert(folder, tmp_path / "b")
    copied = {path.name for path in (tmp_path / "b").iterdir()} & {path.name for path in folder.iterdir()}
    copied -= {"config.json", "model.safetensors.index.json"} | {path.name for path in folder.glob("*.safetensors")}
    assert copied == {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"


def test_copies_of_embedding_and_head_are_restored(folder: Path, tmp_path: Path) -> None:
    """A source that left MTP's copies out becomes a folder that has them, as the release does."""
    save_pretrained(load_pretrained(folder), tmp_path / "one")
    file = next((tmp_path / "one").glob("*.safetensors"))
    index = tmp_path / "one" / "model.safetensors.index.json"
    text = index.read_text().replace(f'    "model.layers.3.embed_tokens.weight": "{file.name}",\n', "")
    assert "layers.3.embed_tokens" not in text
    index.write_text(text)
    convert(tmp_path / "one", tmp_path / "b")
    files = read_folder(tmp_path / "b")
    assert same(files["model.layers.3.embed_tokens.weight"], files["model.embed_tokens.weight"])


@pytest.mark.parametrize("options", [{}, {"fp8": True}, {"dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("kind", ["folder", "fp8_folder"])
def test_tensors_in_pieces_are_the_same_tensors(
    kind: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Path = request.getfixturevalue(kind)
    convert(source, tmp_path / "whole", **options)
    monkeypatch.setattr(encoding, "PIECE", 1)  # 128 rows, the least
    convert(source, tmp_path / "pieces", **options)
    whole, pieces = ({file.name: file.read_bytes() for file in (tmp_path / f).iterdir()} for f in ("whole", "pieces"))
    assert whole == pieces


def test_little_is_in_memory_at_once(fp8_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read

    def counting(self: Checkpoint, tensor: CanonicalTensor, rows: slice) -> Stored:
        nonlocal most
        stored = read(self, tensor, rows)
        assert len(stored.payload) <= 128
        alive.append(weakref.ref(stored.payload))
        most = max(most, sum(ref() is not None for ref in alive))
        return stored

    monkeypatch.setattr(encoding, "PIECE", 1)
    monkeypatch.setattr(Checkpoint, "read", counting)
    convert(fp8_folder, tmp_path / "b", fp8=True)
    assert len(alive) > 100 and most <= 2  # the one being written and the next


def test_progress_is_told_in_bytes(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(folder, tmp_path / "b", dtype=torch.float32, progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in read_folder(tmp_path / "b").values())
    assert {total for _, total in told} == {total}
    assert len(told) > 100 and told[0][0] > 0 and told[-1][0] == total
    assert all(before[0] < after[0] for before, after in pairwise(told))


def test_verify_tells_a_faithful_conversion_from_a_wrong_one(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("v3-yarn-2mtp")
    save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "same")
    report = verify(tmp_path / "a", tmp_path / "same", num_tokens=64)
    assert report.keys() == {"main", "mtp.0", "mtp.1"}
    assert all(part == {"kl_mean": 0.0, "kl_max": 0.0, "top1_agreement": 1.0} for part in report.values())

    convert(tmp_path / "a", tmp_path / "fp8", dtype=torch.bfloat16, fp8=True)
    close = verify(tmp_path / "a", tmp_path / "fp8", num_tokens=64)["main"]
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.normal_()
    save_pretrained(model, tmp_path / "wrong")
    wrong = verify(tmp_path / "a", tmp_path / "wrong", num_tokens=64)["main"]
    assert 0 < close["kl_mean"] <= close["kl_max"]
    assert wrong["kl_mean"] > 10 * close["kl_mean"] and wrong["top1_agreement"] < close["top1_agreement"]


def test_verify_is_the_divergence_of_the_first_from_the_second(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    answers = iter(({"main": p.log()}, {"main": q.log()}))
    monkeypatch.setattr("dsv3.checkpoint.verify._log_probs", lambda *args: next(answers))
    report = verify("a", "b")["main"]
    kl = (p * (p / q).log()).sum(-1)
    assert report == pytest.approx({"kl_mean": kl.mean().item(), "kl_max": kl.max().item(), "top1_agreement": 0.5})


def test_verify_refuses_models_that_cannot_be_compared(make_model: MakeModel, tmp_path: Path) -> None:
    save_pretrained(make_model("v3"), tmp_path / "a")
    save_pretrained(make_model("v3-yarn-2mtp"), tmp_path / "b")
    with pytest.raises(UserError, match="differ in vocabulary or MTP"):
        verify(tmp_path / "a", tmp_path / "b", num_tokens=16)
    with pytest.raises(UserError, match=r"num_tokens is 1, .* at least 2"):
        verify(tmp_path / "a", tmp_path / "a", num_tokens=1)
