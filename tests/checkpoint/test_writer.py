"""Folders are written whole or not at all, in shards, in the format that the reference library reads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dsv3.checkpoint.writer import TensorEntry, write_folder
from dsv3.errors import UserError
from tests.checkpoint.helpers import read_folder, same

CONFIG = {"model_type": "deepseek_v3"}
DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float16, torch.float64]


@pytest.fixture
def tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Of mixed dtypes and odd sizes, so that wide items would fall on odd addresses if laid out as they come."""
    out = {}
    for i in range(15):
        shape = tuple(torch.randint(1, 8, (1 + i % 3,), generator=generator).tolist())
        out[f"t{i}"] = torch.randn(shape, generator=generator).to(DTYPES[i % 5])
    return out


def entries(tensors: dict[str, Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(target: Path, tensors: dict[str, Tensor], **options: object) -> None:
    write_folder(target, entries(tensors), tensors.items(), CONFIG, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_shard_bytes", [1, 200, 10**9])
def test_the_reference_library_reads_it(max_shard_bytes: int, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "c", tensors, max_shard_bytes=max_shard_bytes)
    back = read_folder(tmp_path / "c")
    assert back.keys() == tensors.keys() and all(same(back[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in entries(tensors))
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == CONFIG
    files = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "c" / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
            size = sum(tensors[key].nbytes for key in shard.keys())  # noqa: SIM118
            assert size <= max_shard_bytes or len(list(shard.keys())) == 1


def test_every_tensor_is_aligned(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "c", tensors)
    (file,) = (tmp_path / "c").glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path, generator: torch.Generator) -> None:
    base = torch.randn(6, 10, generator=generator)
    tensors = {"rows": base[2:4], "columns": base[:, 3:5], "transposed": base.T}
    write(tmp_path / "c", tensors)
    back = read_folder(tmp_path / "c")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_an_existing_folder_is_kept_unless_overwriting(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "c", tensors, max_shard_bytes=1)
    before = contents(tmp_path / "c")
    with pytest.raises(UserError, match="exists and is not empty"):
        write(tmp_path / "c", {"other": torch.ones(3)})
    assert contents(tmp_path / "c") == before
    write(tmp_path / "c", {"other": torch.ones(3)}, overwrite=True)
    assert read_folder(tmp_path / "c").keys() == {"other"}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_empty_folder_and_a_new_path_are_fine(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", tensors)
    write(tmp_path / "a" / "b" / "c", tensors)
    assert read_folder(tmp_path / "empty").keys() == read_folder(tmp_path / "a" / "b" / "c").keys() == tensors.keys()


def test_what_is_no_checkpoint_is_never_overwritten(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    run = tmp_path / "run"
    write(run, tensors)
    (run / "step-100").mkdir()
    for folder in (home, run):
        before = contents(folder)
        with pytest.raises(UserError, match="not overwritten"):
            write(folder, tensors, overwrite=True)
        assert contents(folder) == before
    with pytest.raises(UserError, match="is a file"):
        write(home / "thesis.txt", tensors, overwrite=True)


def test_a_link_to_a_folder_stays_a_link(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "real", tensors)
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", {"other": torch.ones(3)}, overwrite=True)
    assert (tmp_path / "link").is_symlink() and read_folder(tmp_path / "real").keys() == {"other"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), UserError("bad tensor"), OSError(errno.ENOSPC, "disk full")])
def test_a_fault_midway_leaves_what_was_there(fault: BaseException, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "c", {"precious": torch.ones(3)})
    before = contents(tmp_path)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[:7]
        raise fault

    expected = UserError if isinstance(fault, OSError) else type(fault)
    for target in (tmp_path / "c", tmp_path / "new"):
        with pytest.raises(expected):
            write_folder(target, entries(tensors), stream(), CONFIG, overwrite=True, max_shard_bytes=100)
        assert contents(tmp_path) == before


def test_a_full_disk_is_told_before_and_during(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", {"precious": torch.ones(3)})
    before = contents(tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            write(tmp_path / "c", tensors, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"needs .* GB, but .* free"):
            write(tmp_path / "c", tensors, overwrite=True)
    assert contents(tmp_path) == before


def test_a_failed_swap_puts_the_old_folder_back(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", {"precious": torch.ones(3)})
    before = contents(tmp_path)
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(UserError, match="I/O error"):
        write(tmp_path / "c", tensors, overwrite=True)
    assert contents(tmp_path) == before


def test_the_folder_has_the_users_permissions(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "c", tensors)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_shard_size_below_one(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_shard_bytes is 0"):
        write(tmp_path / "c", tensors, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["order", "shape", "dtype", "short"])
def test_a_stream_that_breaks_its_promise_is_a_defect(change: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    stream = list(tensors.items())
    if change == "order":
        stream[0], stream[1] = stream[1], stream[0]
    elif change == "shape":
        stream[3] = (stream[3][0], torch.zeros(9, 9, dtype=stream[3][1].dtype))
    elif change == "dtype":
        stream[3] = (stream[3][0], stream[3][1].to(torch.float32))
    else:
        stream.pop()
    with pytest.raises((AssertionError, ValueError)) as error:
        write_folder(tmp_path / "c", entries(tensors), stream, CONFIG)
    assert not isinstance(error.value, UserError)
    assert not list(tmp_path.iterdir())
