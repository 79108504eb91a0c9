"""`plan comm`: what expert parallelism sends, how long that takes, and how much of it computation hides.

One layer, one token (report, section 3.2.2). The token's row goes over the network once to each other node that
holds one of its experts, to the GPU with the sender's place in the node, and from there over NVLink to the GPUs that
hold them. Combine goes the same way back, answers summed on each node first. So, with N nodes of g GPUs:

    network bytes = (rows out + rows back) x E[nodes reached] x (N - 1) / N
    NVLink bytes  = (rows out + rows back) x E[GPUs reached]  x (g - 1) / g

A dispatched row is d bytes in FP8 and d / 128 FP32 scales, or 2 d in BF16; a combined one 2 d (BF16). The backward
pass sends as much again: the gradient of combine is a dispatch, of dispatch a combine. The two links work side by
side, so the slower one counts. Expert ids and weights (a few bytes), latency and congestion are left out.

Uniform routing: topk_group of the n_group groups, then K of their experts, all equally likely. With experts in
contiguous runs on U equal units (nodes, or GPUs), E[units] is a sum of exact binomial ratios: U (1 - P(unit missed)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import Literal

from rich.console import Group, RenderableType

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.display import Plan, seconds, short, table
from dsv3.plan.hardware import GPU
from dsv3.plan.model import attention_flops, block_linears, causal_keys

WirePrecision = Literal["bf16", "fp8"]
Matrix = Sequence[Sequence[float]]
Reach = Callable[[ModelConfig, int], float]


@dataclass(frozen=True)
class Traffic:
    """One MoE layer's communication per token and pass (dispatch and combine), with experts on `nodes` nodes."""

    nodes: int
    nodes_reached: float
    nodes_reached_without_limit: float  # if all groups were open to every token
    gpus_reached: float
    network_bytes: float
    nvlink_bytes: float
    network_seconds: float
    nvlink_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.network_seconds, self.nvlink_seconds)


@dataclass(frozen=True)
class CommPlan(Plan):
    """Times are per token and MoE layer, of one forward pass unless said otherwise."""

    gpu: str
    routing: str  # "uniform", "measured loads" or "measured co-selection"
    experts_per_gpu: int
    dispatch_bytes: int  # of one row to one place
    combine_bytes: int
    most_nodes: int  # that a token can reach
    free_experts_per_node: float  # experts a token may visit on a node before NVLink is slower than the network
    free_experts: float  # that, on `most_nodes` nodes
    traffic: Traffic
    communication_seconds: float
    compute_seconds: float
    hidden_forward: float  # share of the communication that the same pass's computation can cover
    hidden_backward: float  # the same with twice the computation
    hidden_pair: float  # a forward and a backward pass overlapped, as in DualPipe
    hidden_nodes: float  # remote nodes a token could reach before the pair's network time exceeds its computation
    largest_hidden_node_count: int  # of `scaling`; 0 if even one node's NVLink is too slow
    scaling: tuple[Traffic, ...]
    network_bytes_per_token: float  # all MoE layers, forward and backward


def plan_comm(
    config: ModelConfig,
    gpu: GPU,
    *,
    nodes: int = 8,
    dispatch: WirePrecision = "fp8",
    precision: WirePrecision = "fp8",
    efficiency: float = 0.25,
    context: int = 4096,
    routing: Sequence[float] | Matrix | None = None,
) -> CommPlan:
    """Dispatch and combine of `config`'s MoE layers with experts spread over `nodes` nodes of `gpu`.

    `precision` and `efficiency` say how fast a block computes: the share of the dense peak that it reaches while
    communication kernels run beside it. `routing` is a measured load per expert [E], or how many tokens chose both
    experts i and j [E, E] (the diagonal: chose i); None is uniform. Raises `UserError` if the experts do not divide.
    """
    moe = next((layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)), None)
    if moe is None:
        raise UserError("this config has no MoE layer, so there is nothing to dispatch")
    fitting = [
        n for n in range(1, config.n_routed_experts + 1) if config.n_routed_experts % (n * gpu.gpus_per_node) == 0
    ]
    if nodes not in fitting:
        raise UserError(
            f"{config.n_routed_experts} experts do not divide over {nodes} nodes of {gpu.gpus_per_node} GPUs; "
            f"node counts that work: {', '.join(map(str, fitting)) or 'none'}"
        )
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency is {efficiency}, expected a share of the peak above 0 and at most 1")

    out, back = row_bytes(config, dispatch), 2 * config.hidden_size
    kind, reach = _read_routing(config, routing)
    compute = block_seconds(config, gpu, moe, context=context, precision=precision, efficiency=efficiency)
    scaling = tuple(expert_traffic(config, gpu, n * gpu.gpus_per_node, dispatch, reach) for n in fitting)
    here = scaling[fitting.index(nodes)]
    ratio = gpu.nvlink_bandwidth / gpu.network_bandwidth
    most = most_units(config, nodes)
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_layers_with_mtp))

    def hidden(compute_passes: float, comm_passes: float) -> float:
        return min(1.0, compute_passes * compute / (comm_passes * here.seconds)) if here.seconds else 1.0

    return CommPlan(
        gpu=gpu.name,
        routing=kind,
        experts_per_gpu=config.n_routed_experts // (nodes * gpu.gpus_per_node),
        dispatch_bytes=out,
        combine_bytes=back,
        most_nodes=most,
        free_experts_per_node=ratio,
        free_experts=ratio * most,
        traffic=here,
        communication_seconds=here.seconds,
        compute_seconds=compute,
        hidden_forward=hidden(1, 1),
        hidden_backward=hidden(2, 1),
        hidden_pair=hidden(3, 2),
        hidden_nodes=1.5 * compute * gpu.network_bandwidth / (out + back),
        largest_hidden_node_count=max((t.nodes for t in scaling if t.seconds <= 1.5 * compute), default=0),
        scaling=scaling,
        network_bytes_per_token=2 * layers * here.network_bytes,
    )


def expert_traffic(
    config: ModelConfig, gpu: GPU, ranks: int, dispatch: WirePrecision, reach: Reach | None = None
) -> Traffic:
    """Traffic of one MoE layer with its experts on `ranks` GPUs, whole nodes or a part of one.

    `reach(config, units)` is the expected number of units that a token reaches; None is `expected_units`.
    """
    reach = reach or expected_units
    g = min(ranks, gpu.gpus_per_node)
    if ranks % g:
        raise UserError(f"{ranks} expert-parallel GPUs are neither whole nodes of {g} nor a part of one")
    n, rows = ranks // g, row_bytes(config, dispatch) + 2 * config.hidden_size
    reached, gpus = reach(config, n), reach(config, ranks)
    network, nvlink = rows * reached * (n - 1) / n, rows * gpus * (g - 1) / g
    return Traffic(
        nodes=n,
        nodes_reached=reached,
        nodes_reached_without_limit=expected_units(config.replace(topk_group=config.n_group), n),
        gpus_reached=gpus,
        network_bytes=network,
        nvlink_bytes=nvlink,
        network_seconds=network / gpu.network_bandwidth,
        nvlink_seconds=nvlink / gpu.nvlink_bandwidth,
    )


def row_bytes(config: ModelConfig, precision: WirePrecision) -> int:
    """Bytes of one token's row on the wire: FP8 with one FP32 scale per 128 values, or BF16."""
    if precision == "fp8":
        return config.hidden_size + 4 * ceil(config.hidden_size / 128)
    return 2 * config.hidden_size


def block_seconds(
    config: ModelConfig, gpu: GPU, layer: int, *, context: int, precision: str, efficiency: float
) -> float:
    """Forward seconds per token of block `layer`: its matrices at `precision`, attention over keys in BF16."""
    linear = sum(x.flops for x in block_linears(config, layer))
    attention = attention_flops(config, causal_keys(context))
    return (linear / gpu.peak_flops(precision) + attention / gpu.bf16_flops) / efficiency


def most_units(config: ModelConfig, units: int) -> int:
    """The most of `units` equal units (nodes or GPUs) that one token can reach."""
    straddled = units % config.n_group and config.n_group % units  # a group may begin and end within a unit
    per_group = ceil(units / config.n_group) + bool(straddled)
    return min(config.num_experts_per_tok, units, _open_groups(config) * per_group)


def expected_units(config: ModelConfig, units: int) -> float:
    """Expected number of `units` equal units that a token reaches under uniform routing (see the module's head).

    Raises `UserError` if the experts do not divide over the units.
    """
    E, K, G, M = config.n_routed_experts, config.num_experts_per_tok, config.n_group, _open_groups(config)
    if E % units:
        raise UserError(f"{E} experts do not divide over {units} units: take a divisor of {E}")
    size, group, available = E // units, E // G, M * (E // G)
    missed: dict[tuple[int, ...], float] = {}  # by the unit's share of each group that it overlaps

    def miss(shares: tuple[int, ...]) -> float:
        ways = {(0, 0): 1}  # (open groups among those overlapped, the unit's experts in them) -> choices
        for share in shares:
            for (k, own), count in list(ways.items()):
                ways[k + 1, own + share] = ways.get((k + 1, own + share), 0) + count
        chosen = sum(
            count * comb(G - len(shares), M - k) * comb(available - own, K)
            for (k, own), count in ways.items()
            if k <= M
        )
        return chosen / (comb(G, M) * comb(available, K))

    reached = 0.0
    for start in range(0, E, size):
        groups = range(start // group, (start + size - 1) // group + 1)
        shares = tuple(min(start + size, (i + 1) * group) - max(start, i * group) for i in groups)
        if shares not in missed:
            missed[shares] = miss(shares)
        reached += 1 - missed[shares]
    return reached


def _open_groups(config: ModelConfig) -> int:
    return config.n_group if config.topk_method == "greedy" else config.topk_group


class _Measured:
    """Expected units from measured choices: a Polya (beta-binomial) law for the number of a token's experts in a unit.

    Its mean is the unit's share p of the load, its second moment the co-selection within the unit, so that
    P(none) = prod_{i<K} (1 - p + i c) / (1 + i c), where c > 0 means that experts of a unit are chosen together.
    Loads alone do not say that; then c = -1 / E, draws without replacement.
    """

    def __init__(self, loads: Sequence[float], pairs: Matrix | None) -> None:
        self.loads, self.pairs = loads, pairs

    def __call__(self, config: ModelConfig, units: int) -> float:
        E, K = config.n_routed_experts, config.num_experts_per_tok
        size, total, reached = E // units, sum(self.loads), 0.0
        for start in range(0, E, size):
            inside = range(start, start + size)
            p = sum(self.loads[i] for i in inside) / total
            c = -1 / E
            if self.pairs is not None and K > 1:
                both = sum(self.pairs[i][j] for i in inside for j in inside if i != j)
                q = both / total / (K - 1)  # E[n (n - 1)] / (K (K - 1)), as total = K x tokens
                if p - q < 1e-12:  # who comes, comes with all K
                    reached += p
                    continue
                c = (q - p * p) / (p - q)
            missed = math.prod(max(0.0, 1 - p + i * c) / max(1e-12, 1 + i * c) for i in range(K))
            reached += 1 - missed
        return min(reached, most_units(config, units))


def _read_routing(config: ModelConfig, routing: Sequence[float] | Matrix | None) -> tuple[str, Reach]:
    """(name of the source, units that a token reaches by it). Raises `UserError` on a wrong shape or counts."""
    if routing is None:
        return "uniform", expected_units
    E, K = config.n_routed_experts, config.num_experts_per_tok
    rows = [list(row) if isinstance(row, Iterable) else [row] for row in routing]
    widths = {len(row) for row in rows}
    if len(rows) != E or widths not in ({1}, {E}):
        raise UserError(
            f"routing has {len(rows)} rows of {sorted(widths)} values, expected [{E}] loads or [{E}, {E}] pairs"
        )
    if any(not math.isfinite(x) or x < 0 for row in rows for x in row):
        raise UserError("routing holds a negative or non-finite count; expected counts of tokens")
    if widths == {1} and E > 1:
        loads = [row[0] for row in rows]
        _require_load(sum(loads))
        return "measured loads", _Measured(loads, None)
    loads = [rows[i][i] for i in range(E)]
    _require_load(sum(loads))
    chosen = sum(map(sum, rows)) / sum(loads)
    if abs(chosen - K) > 0.01 * K:
        raise UserError(
            f"the co-selection matrix is of tokens with {chosen:.2f} experts each, but the config chooses {K}: "
            "entry (i, j) must count the tokens that chose both i and j, entry (i, i) those that chose i"
        )
    return "measured co-selection", _Measured(loads, rows)


def _require_load(total: float) -> None:
    if total <= 0:
        raise UserError("routing counts no token at all; give the counts of a run")


def render(plan: CommPlan) -> RenderableType:
    """The plan as tables."""
    here = plan.traffic
    summary = [
        ("row out / back", f"{short(plan.dispatch_bytes, 'B')} / {short(plan.combine_bytes, 'B')}"),
        ("nodes reached (at most)", f"{here.nodes_reached:.2f} ({plan.most_nodes})"),
        ("GPUs reached", f"{here.gpus_reached:.2f}"),
        ("over the network", f"{short(here.network_bytes, 'B')} in {seconds(here.network_seconds)}"),
        ("over NVLink", f"{short(here.nvlink_bytes, 'B')} in {seconds(here.nvlink_seconds)}"),
        ("block's computation", seconds(plan.compute_seconds)),
        ("hidden forward / backward / pair", _shares(plan.hidden_forward, plan.hidden_backward, plan.hidden_pair)),
        ("remote nodes that the pair hides", f"{plan.hidden_nodes:.2f}"),
        (
            "experts a node before NVLink is slower",
            f"{plan.free_experts_per_node:.1f} ({plan.free_experts:.1f} in all)",
        ),
        ("network, all layers, both passes", f"{short(plan.network_bytes_per_token, 'B')} a token"),
    ]
    scaling = [
        (
            str(t.nodes),
            f"{t.nodes_reached:.2f}",
            f"{t.nodes_reached_without_limit:.2f}",
            seconds(t.network_seconds),
            seconds(t.nvlink_seconds),
            "yes" if t.nodes <= plan.largest_hidden_node_count else "no",
        )
        for t in plan.scaling
    ]
    return Group(
        table(
            f"One MoE layer, per token and pass: {here.nodes} nodes of {plan.gpu}, {plan.routing} routing",
            ("", "value"),
            summary,
        ),
        table(
            "Experts over more nodes",
            ("nodes", "reached", "without limit", "network", "NVLink", "hidden by a pair"),
            scaling,
        ),
    )


def _shares(*values: float) -> str:
    return " / ".join(f"{value:.0%}" for value in values)
