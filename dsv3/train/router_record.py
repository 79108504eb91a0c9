"""Which experts every token of a training step visited: all layers, all processes, one file a step.

What studies of the router want to know of a run, while it happens. Each process writes the routings that it made to
their places in the file, so nothing is gathered, and the file does not tell under which layout it was written: its
sequences are those of the step, in their order. All processes must see the same folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.parts import create_file, fill_file
from dsv3.checkpoint.writer import TensorEntry, check_space
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.files import make_folder, refusals
from dsv3.model.router import Routing
from dsv3.model.transformer import routed_layers
from dsv3.parallel.ranks import Ranks
from dsv3.train.config import TrainConfig
from dsv3.train.timetable import Step

FOLDER = "router"  # within a run
_TOKENS, _IDS, _WEIGHTS = "tokens", "expert_ids", "weights"


@dataclass(frozen=True)
class RouterRecord:
    """The routing of one step's B sequences of S tokens, by layer name ("layers.3", "mtp.0") in the model's order.

    Of MTP depth k = 1, 2, .. there are S - k positions; position i is where it reads token i + k.
    """

    step: int
    tokens_BS: Tensor  # int32, what the model read
    expert_ids: dict[str, Tensor]  # [B, S - k, K] int16, best selection score first
    weights: dict[str, Tensor]  # [B, S - k, K] float32, `routed_scaling_factor` included


def router_records(run: Path) -> list[Path]:
    """The records in a run's folder, by step."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def read_router_record(path: Path) -> RouterRecord:
    """What `RouterRecorder.save` wrote. Raises `UserError` if the file is none of these, or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            layers = json.loads(metadata["layers"])
            return RouterRecord(
                int(metadata["step"]),
                file.get_tensor(_TOKENS),
                {layer: file.get_tensor(f"{layer}.{_IDS}") for layer in layers},
                {layer: file.get_tensor(f"{layer}.{_WEIGHTS}") for layer in layers},
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no router record ({error}): expected a file of a run's '{FOLDER}' folder, which "
            "`dsv3 train --router-every` fills"
        ) from None


class RouterRecorder:
    """The routings of one step on this process.

    tokens_BS1: of the step's sequences those that it takes, perhaps none; first: the number of the first of them.
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, plan: Step, tokens_BS1: Tensor, first: int) -> None:
        self._tokens_BS, self._first = tokens_BS1[:, :-1].to("cpu", torch.int32), first
        self._size = config.micro_batch_size or plan.sequences
        S, mtp = self._tokens_BS.shape[1], plan.mtp_weight > 0
        depths = {layer: int(layer.removeprefix("mtp.")) + 1 for layer in routed_layers(model) if "mtp" in layer}
        self._positions = {
            layer: S - depths.get(layer, 0)
            for layer in routed_layers(model)
            if layer not in depths or (mtp and depths[layer] < S)
        }
        self._entries = [TensorEntry(_TOKENS, (plan.sequences, S), torch.int32)]
        for layer, positions in self._positions.items():
            shape = plan.sequences, positions, model.num_experts_per_tok
            self._entries.append(TensorEntry(f"{layer}.{_IDS}", shape, torch.int16))
            self._entries.append(TensorEntry(f"{layer}.{_WEIGHTS}", shape, torch.float32))
        self._pieces: list[tuple[str, int, Tensor]] = []

    def observe(self, routings: Mapping[str, Routing], micro_batch: int) -> None:
        """Take in what a forward pass of one of this process's micro-batches returned."""
        begin = micro_batch * self._size
        count = min(self._size, len(self._tokens_BS) - begin)
        if count <= 0:
            return  # padding
        for layer, routing in routings.items():
            shape = count, self._positions[layer], -1
            for kind, values_TK in ((_IDS, routing.expert_ids_TK), (_WEIGHTS, routing.weights_TK)):
                dtype = torch.int16 if kind == _IDS else torch.float32
                values_BSK = values_TK.detach().to("cpu", dtype).view(shape)
                self._pieces.append((f"{layer}.{kind}", self._first + begin, values_BSK))

    def save(self, run: Path, step: int, ranks: Ranks) -> Path:
        """Write the record of all processes, which call this together, into the run's folder; returns its path."""
        path = run / FOLDER / f"step-{step:08d}.safetensors"
        unfinished = path.with_name(f".{path.name}.tmp")
        metadata = {"step": str(step), "layers": json.dumps(list(self._positions))}

        def create() -> None:
            make_folder(path.parent)
            with refusals(path):
                check_space(path, sum(entry.nbytes for entry in self._entries))
                create_file(unfinished, self._entries, metadata)

        def fill() -> None:
            with refusals(path):
                fill_file(unfinished, self._entries, self._own(ranks), metadata)

        def finish() -> None:
            with refusals(path):
                os.replace(unfinished, path)

        ranks.first_alone(create)
        ranks.together(fill)
        ranks.first_alone(finish)
        return path

    def _own(self, ranks: Ranks) -> Iterator[tuple[str, int, Tensor]]:
        if ranks.mesh.pp.index == 0:  # all of a pipeline have the same tokens
            yield _TOKENS, self._first, self._tokens_BS
        yield from self._pieces
