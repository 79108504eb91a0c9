"""Reading a checkpoint folder: safetensors shards, one tensor at a time, nothing trusted.

All headers are read and checked first, so that a truncated or missing shard is known before anything is built
or written. Tensors come straight from the file that holds them; one shard is open at a time, which bounds
memory by a shard however large the model. Pickles are refused: loading one runs whatever code it carries.
"""

from __future__ import annotations

import json
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


class CheckpointReader:
    """The tensors of one folder, by name. Raises `UserError` at once if the folder is not whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"there is no checkpoint folder {self.path}; expected a local folder, downloaded before")
        weight_map = _read_index(self.path)
        self._open_shard: tuple[str, Any] | None = None
        self._infos: dict[str, TensorInfo] = {}
        shards: dict[str, list[str]] = {}
        for name, shard in (weight_map or {}).items():
            shards.setdefault(shard, []).append(name)
        if weight_map is None:
            shards[SINGLE_FILE] = list(self._shard(SINGLE_FILE).keys())
        for shard, names in shards.items():
            file = self._shard(shard)
            if absent := set(names) - set(file.keys()):
                raise UserError(f"{self.path / shard} lacks {some(absent)}, which {INDEX_FILE} places there")
            for name in names:
                entry = file.get_slice(name)
                self._infos[name] = TensorInfo(tuple(entry.get_shape()), entry.get_dtype(), shard)
        self.shards = tuple(sorted(shards))

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and shard, without reading the tensor."""
        return self._infos[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; `UserError` if it is none that holds weights."""
        stored = self._infos[name].dtype
        if stored not in DTYPES:
            raise UserError(f"{self.path}: tensor {name} has dtype {stored}, expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU. It may be a view of the mapped file: copy it to keep it."""
        out: Tensor = self._shard(self._infos[name].shard).get_tensor(name)
        return out

    def _shard(self, shard: str) -> Any:
        if self._open_shard is None or self._open_shard[0] != shard:
            self._open_shard = None  # unmap the last one before the next is mapped
            file = self.path / shard
            if not file.is_file():
                raise UserError(f"shard {file} is missing: download or copy it again")
            try:
                self._open_shard = (shard, safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or no safetensors file ({error}): download it again") from error
        return self._open_shard[1]


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
