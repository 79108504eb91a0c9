"""The layout of processes: sizes that fit, sizes that do not, and who is joined with whom."""

import pytest
import torch

from dsv3.errors import UserError
from dsv3.parallel.mesh import Axis, Layout, Mesh, axis_lines, connect
from dsv3.parallel.ranks import Ranks


@pytest.mark.parametrize(
    ("layout", "processes", "replicate"),
    [
        (Layout(), 1, 1),
        (Layout(), 6, 6),
        (Layout(dp_shard=4, ep=2), 8, 2),
        (Layout(pp=2, ep=4), 8, 4),
        (Layout(dp_replicate=2, dp_shard=2, ep=4, pp=2), 8, 2),
    ],
)
def test_what_is_left_over_are_replicas(layout, processes, replicate):
    assert layout.resolve(processes).dp_replicate == replicate


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        (Layout(dp_shard=4), 6, "pp 1 x dp_shard 4 does not make up 6 processes"),
        (Layout(dp_replicate=2), 1, "dp_replicate 2 does not make up 1 process:"),
        (Layout(pp=4), 2, "pp 4"),
        (Layout(ep=3), 4, "ep is 3, expected a divisor of dp_replicate x dp_shard"),
        (Layout(dp_shard=6, ep=4), 12, "divides dp_shard or is a multiple of it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(layout, processes, message):
    with pytest.raises(UserError, match=message):
        layout.resolve(processes)


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    """Before it waits for the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match=r"has 2 GPUs, but process 3 of it was started.*start 2 per node"):
        connect(Layout(), torch.device("cuda"))


@pytest.mark.parametrize("name", ["dp_replicate", "dp_shard", "ep", "pp"])
def test_an_axis_has_somebody(name):
    with pytest.raises(UserError, match=f"{name} is 0, expected at least 1"):
        Layout(**{name: 0})


@pytest.mark.parametrize("node_size", [2, 4, 16])
@pytest.mark.parametrize(
    "layout",
    [Layout(8), Layout(2, 4, 2), Layout(2, 2, 4, 2), Layout(1, 8, 4), Layout(4, 1, 4, 2), Layout(2, 2, 2, 2)],
)
def test_every_rank_is_on_one_line_of_each_axis(layout, node_size):
    lines = axis_lines(layout, node_size)
    world = layout.dp_replicate * layout.dp_shard * layout.pp
    for name, axis in lines.items():
        assert sorted(rank for line in axis for rank in line) == list(range(world)), name
        assert len({len(line) for line in axis}) == 1, name
    size = {name: len(axis[0]) for name, axis in lines.items()}
    assert size["data"] == size["replicate"] * size["shard"] == size["ep"] * size["expert_data"]
    assert size["expert_data"] == size["expert_replicate"] * size["expert_shard"]
    assert size["ep"] == size["ep_node"] * size["ep_across"]
    assert size["pp"] == layout.pp and size["ep"] == layout.ep and size["shard"] == layout.dp_shard


def test_two_nodes_of_two_stages():
    lines = axis_lines(Layout(dp_replicate=1, dp_shard=4, ep=2, pp=2), 4)
    assert lines["pp"] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert lines["shard"] == lines["data"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert lines["ep"] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert lines["expert_shard"] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert {len(line) for line in lines["expert_replicate"]} == {1}


def test_experts_over_two_nodes_know_their_node():
    lines = axis_lines(Layout(dp_replicate=4, ep=4), 2)
    assert lines["ep"] == [(0, 1, 2, 3)]
    assert lines["ep_node"] == [(0, 1), (2, 3)]
    assert lines["ep_across"] == [(0, 2), (1, 3)]


def test_wrong_sizes_are_told_before_anybody_is_waited_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="dp_shard 3 does not make up 4 processes"):
        connect(Layout(dp_shard=3), torch.device("cpu"))
    with pytest.raises(UserError, match="device is 'mps'"):
        connect(Layout(), torch.device("mps"))


def test_a_process_alone_takes_everything_and_waits_for_nobody():
    ranks = Ranks()
    assert ranks.share(7) == (0, 7) and ranks.count == 1 and ranks.any(True) and not ranks.any(False)
    assert ranks.gather(3, 4).tolist() == [[3, 4]]
    assert ranks.first_found(None) is None and ranks.first_found("layer 3") == "layer 3"


@pytest.mark.parametrize(("rows", "size"), [(7, 3), (2, 4), (8, 4), (0, 2)])
def test_rows_are_shared_without_gap_or_overlap(rows, size):
    lines = tuple(range(size))
    shares = [Ranks(Mesh(data=Axis(lines, place))).share(rows) for place in lines]
    assert [row for first, count in shares for row in range(first, first + count)] == list(range(rows))
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


def test_a_process_alone_sums_with_nobody():
    mesh = Mesh()
    assert mesh.is_first and not mesh.distributed
    assert mesh.data.sum_(torch.tensor([3.0])).item() == 3
