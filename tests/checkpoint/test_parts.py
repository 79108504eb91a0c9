"""The parts of many processes make up the whole checkpoint, each row once, whatever the layout."""

from __future__ import annotations

import pytest
import torch

from dsv3.checkpoint.names import canonical_tensors
from dsv3.checkpoint.parts import create_file, fill_file, held_pieces, read_parts
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.checkpoint.source import Checkpoint
from dsv3.checkpoint.writer import TensorEntry, write_folder
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert import distribute_experts
from dsv3.parallel.mesh import Axis, Layout, Mesh, axis_lines
from dsv3.parallel.shard import Sharding, shard_parameters

CONFIG = ModelConfig.preset("micro").replace(num_hidden_layers=2)


def meshes(layout: Layout) -> list[Mesh]:
    """Every rank's mesh, without the processes."""
    lines = axis_lines(layout, node_size=8)
    world = len(lines["world"][0])
    return [
        Mesh(
            layout,
            rank,
            **{
                name: next(Axis(line, line.index(rank)) for line in axis if rank in line)
                for name, axis in lines.items()
            },
        )
        for rank in range(world)
    ]


def parts_of(mesh: Mesh) -> tuple[Sharding, dict[str, torch.Tensor]]:
    """A rank's sharding and what it holds of the parameters and buffers of a model that is the same everywhere."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    distribute_experts(model, mesh)
    sharding = shard_parameters(model, mesh, torch.float32)
    rows = {name: sharding.own(name, parameter.detach()) for name, parameter in model.named_parameters()}
    return sharding, {**dict(model.named_buffers()), **rows}


@pytest.mark.parametrize("layout", [Layout(1), Layout(3), Layout(4, ep=2), Layout(4, ep=4), Layout(8, ep=2)], ids=str)
def test_each_row_of_each_tensor_is_written_once_and_is_right(layout):
    torch.manual_seed(0)
    state = Transformer(CONFIG).state_dict()
    written = {tensor.name: torch.zeros(tensor.shape[0], dtype=torch.int64) for tensor in canonical_tensors(CONFIG)}
    for mesh in meshes(layout):
        sharding, held = parts_of(mesh)
        for piece in held_pieces(CONFIG, sharding.written(held)):
            written[piece.tensor.name][piece.rows] += 1
            ours = held[piece.tensor.param][piece.index]
            assert torch.equal(ours, piece.tensor.view(state)[piece.rows]), piece
    for name, counts in written.items():
        assert bool((counts == 1).all()), name


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_rows_are_read_as_the_whole_is_from_fp8_blocks_too(fp8_folder, ranks):
    """The cuts lie within blocks of 128 rows, and experts of 136 rows begin within them."""
    whole = load_pretrained(fp8_folder, dtype=torch.float32)
    state = whole.state_dict()
    for mesh in meshes(Layout(ranks)):
        sharding = shard_parameters(whole, mesh, torch.float32)
        held = {}
        for name, tensor in state.items():
            part = sharding.part(name, tensor)
            held[name] = torch.full_like(tensor[part.begin : part.end], float("nan")), part.begin
        read_parts(Checkpoint(fp8_folder), whole.config, held)
        for name, (rows, first) in held.items():
            assert torch.equal(rows, state[name][first : first + len(rows)]), name


def test_a_file_filled_in_pieces_is_the_file_written_at_once(tmp_path, generator):
    tensors = {
        "a": torch.randn(5, 3, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    entries = [TensorEntry(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    write_folder(tmp_path / "whole", entries, tensors.items(), {})
    file = tmp_path / "pieces.safetensors"
    create_file(file, entries)
    fill_file(file, entries, [("b", 4, tensors["b"][4:]), ("a", 0, tensors["a"][:2]), ("c", 0, tensors["c"])])
    fill_file(file, entries, [("a", 2, tensors["a"][2:]), ("b", 0, tensors["b"][:4])])
    assert file.read_bytes() == next((tmp_path / "whole").glob("*.safetensors")).read_bytes()
