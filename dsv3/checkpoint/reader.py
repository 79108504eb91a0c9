"""Reading a checkpoint folder: safetensors shards, one tensor at a time, nothing trusted.

All headers are read and checked first, so that a truncated or missing shard is known before anything is built
or written. Tensors, or some rows of one, are read into memory of their own: the pages of a mapped file would count
as the process's memory, up to a whole shard. Pickles are refused: loading one runs whatever code it carries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "BF16", "F8_E4M3", ...
    shard: str
    offset: int  # of its first byte in the shard


class CheckpointReader:
    """The tensors of one folder, by name. Raises `UserError` at once if the folder is not whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"there is no checkpoint folder {self.path}; expected a local folder, downloaded before")
        weight_map = _read_index(self.path)
        self._infos: dict[str, TensorInfo] = {}
        if weight_map is None:
            self._infos = _read_header(self.path, SINGLE_FILE)
            self.shards: tuple[str, ...] = (SINGLE_FILE,)
            return
        names: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            names.setdefault(shard, []).append(name)
        for shard in names:
            infos = _read_header(self.path, shard)
            if absent := set(names[shard]) - set(infos):
                raise UserError(f"{self.path / shard} lacks {some(absent)}, which {INDEX_FILE} places there")
            self._infos |= {name: infos[name] for name in names[shard]}
        self.shards = tuple(sorted(names))

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place, without reading the tensor."""
        return self._infos[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; `UserError` if it is none that holds weights."""
        stored = self._infos[name].dtype
        if stored not in DTYPES:
            raise UserError(f"{self.path}: tensor {name} has dtype {stored}, expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor as stored, or some of its rows, on the CPU. Raises `UserError` if the file cannot be read."""
        info = self._infos[name]
        file = self.path / info.shard
        first, end, _ = rows.indices(info.shape[0])
        out = torch.empty((end - first, *info.shape[1:]), dtype=self.dtype(name))
        row_bytes = math.prod(info.shape[1:]) * out.dtype.itemsize
        try:
            with file.open("rb") as raw:
                raw.seek(info.offset + first * row_bytes)
                length = raw.readinto(out.view(torch.uint8).numpy().data)
        except OSError as error:
            raise UserError(f"cannot read {name} from {file}: {error.strerror}") from error
        if length < out.nbytes:
            raise UserError(f"{file} has been cut short since it was opened: {name} is not whole")
        return out


def _read_header(path: Path, shard: str) -> dict[str, TensorInfo]:
    """What a shard's header says of its tensors, once the reference library has found that it fits the file."""
    file = path / shard
    if not file.is_file():
        raise UserError(f"shard {file} is missing: download or copy it again")
    try:
        with safe_open(file, framework="pt"), file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or no safetensors file ({error}): download it again") from error
    return {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"], shard, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> shard file from the index; None if the folder holds one unsharded file."""
    file = path / INDEX_FILE
    if not file.is_file():
        if (path / SINGLE_FILE).is_file():
            return None
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
        found = f"; it holds pickles ({some(pickles)}), which dsv3 does not load" if pickles else ""
        raise UserError(f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}{found}: convert the weights to safetensors")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file} has no 'weight_map' of tensor names to shard files")
    for name, shard in weight_map.items():
        # A plain file name only: an index from elsewhere must not reach outside its own folder.
        if (
            not isinstance(shard, str)
            or shard != Path(shard).name
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise UserError(f"{file} places {name} in {shard!r}, expected the name of a .safetensors file beside it")
    return weight_map


def some(names: Any, limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
