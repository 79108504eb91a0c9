"""A checkpoint folder as a whole: its config, its tensors, and whether the two belong together.

`compare` states the difference; `Checkpoint` insists that there is none, and gives each canonical tensor as it
is stored, with the scales of its FP8 blocks where it has any.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.hf_config import load_config
from dsv3.checkpoint.names import CanonicalTensor, canonical_tensors
from dsv3.checkpoint.reader import CheckpointReader, some
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.ops.fp8 import BLOCK, dequantize_blocks, scale_shape

SCALE_SUFFIX = "_scale_inv"
# Buffers that old exporters wrote beside the weights; they follow from the config.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Difference:
    """How a folder's tensors differ from those of its config, by name."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape expected, shape found

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} (expected {list(want)}, found {list(found)})" for name, want, found in self.mismatched]
        parts = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts if names)


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint holds it: plain, or E4M3 with a scale per 128x128 block."""

    payload: Tensor
    scale: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`, FP8 blocks multiplied by their scales."""
        if self.scale is None:
            return self.payload.to(dtype)
        return dequantize_blocks(self.payload, self.scale, dtype)


def compare(config: ModelConfig, reader: CheckpointReader) -> Difference:
    """What a strict load of these tensors into a model of `config` would trip over. Reads headers only.

    MTP's copies of embedding and head may be left out. A tensor in FP8 must have its scales.
    """
    expected: dict[str, tuple[int, ...]] = {}
    optional = set()
    for tensor in canonical_tensors(config):
        expected[tensor.name] = tensor.shape
        if tensor.copy_of is not None:
            optional.add(tensor.name)
        if tensor.name in reader and reader.info(tensor.name).dtype == "F8_E4M3":
            shape = scale_shape(tensor.shape) if len(tensor.shape) == 2 else ()
            expected[tensor.name + SCALE_SUFFIX] = shape
    return Difference(
        missing=[name for name in expected if name not in reader and name not in optional],
        unexpected=[name for name in reader if name not in expected and not _DERIVED.search(name)],
        mismatched=[
            (name, shape, reader.info(name).shape)
            for name, shape in expected.items()
            if name in reader and reader.info(name).shape != shape
        ],
    )


class Checkpoint:
    """A folder whose tensors are exactly those of its config.json; raises `UserError` listing what is not so.

    A config that promises MTP modules over tensors that have none at all is taken without them, with a warning:
    that is what transformers leaves when it saves a model it loaded from the release.
    """

    def __init__(self, path: str | Path) -> None:
        self.config = load_config(path)
        self.reader = CheckpointReader(path)
        layers = (int(match[1]) for match in map(_LAYER.match, self.reader) if match)
        if self.config.num_nextn_predict_layers and max(layers, default=-1) < self.config.num_hidden_layers:
            warnings.warn(
                f"{path}: config.json promises {self.config.num_nextn_predict_layers} MTP module(s), the shards hold "
                "none; going on without",
                stacklevel=3,
            )
            self.config = self.config.replace(num_nextn_predict_layers=0)
        if difference := compare(self.config, self.reader):
            raise UserError(f"{path}: the tensors do not belong to config.json: {difference}")

    def check_fits(self, config: ModelConfig) -> None:
        """Raise `UserError` unless a model of `config`, which need not be the folder's own, has the same tensors."""
        if difference := compare(config, self.reader):
            raise UserError(
                f"{self.reader.path}: the tensors do not fit the model that they are to be loaded into: {difference}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is not FP8, told by the embedding."""
        return self.reader.dtype("model.embed_tokens.weight")

    def stored_dtype(self, tensor: CanonicalTensor) -> torch.dtype:
        """The dtype of one tensor in the files."""
        return self.reader.dtype(self._name(tensor))

    def read(self, tensor: CanonicalTensor, rows: slice = slice(None)) -> Stored:
        """One tensor, or rows of it that start at a multiple of 128, on the CPU.

        Raises `UserError` if a scale is NaN or infinite.
        """
        name = self._name(tensor)
        payload = self.reader.tensor(name, rows)
        if self.reader.dtype(name) != torch.float8_e4m3fn:
            return Stored(payload)
        first, end, _ = rows.indices(tensor.shape[0])
        scale = self.reader.tensor(name + SCALE_SUFFIX, slice(first // BLOCK, -(-end // BLOCK))).float()
        if not scale.isfinite().all():
            raise UserError(f"{self.reader.path}: {name + SCALE_SUFFIX} has scales that are NaN or infinite")
        return Stored(payload, scale)

    def _name(self, tensor: CanonicalTensor) -> str:
        if tensor.copy_of is not None and tensor.name not in self.reader:
            return tensor.copy_of
        return tensor.name
