"""`plan serve`: how many GPUs a service needs, with prefill and decoding on units of their own.

Both follow the report's section 3.4: attention and shared experts are replicated (data parallel, no tensor
parallelism), the routed experts and their redundant copies are spread over a unit's GPUs, two micro-batches overlap,
so that a step takes the longer of computation and communication.

*Prefill* computes: FLOPs of a prompt over (peak x efficiency); dispatch and combine as `plan comm` counts them.

*Decoding*, one step of B requests a GPU that hold S cached tokens each; a request's t = 1 + D tokens (the last one and
D drafts) share one reading of its cache:

    attention     = layers x max(B S cache bytes / memory rate, B t absorbed attention FLOPs / BF16 peak)
    matrices      = max(all weights of the GPU / memory rate, B t FLOPs / peak of the precision)
    communication = MoE layers x B t K (row out + row back) / network rate      (point to point, K copies)
    tokens a step = 1 + p_1 + p_1 p_2 + ...       p_d: draft d accepted, given that all before it were

An MTP module adds its layer to all three for every draft. Rates are peaks times an efficiency.

These are bounds of an evenly loaded, always full service; uneven load and arrivals take their share. `references`
puts the same arithmetic beside what DeepSeek published of its own service.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from rich.console import Group, RenderableType

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.comm import WirePrecision, block_seconds, expert_traffic, row_bytes
from dsv3.plan.display import Plan, gib, seconds, short, table
from dsv3.plan.hardware import GPU, find_gpu
from dsv3.plan.model import attention_flops, block_linears, block_vectors, embedding_parameters


@dataclass(frozen=True)
class Service:
    """The load to carry, how good it must be, and how it is deployed.

    The default efficiencies: 0.3 of the compute peaks puts prefill near the 52.3K tokens/s that LMSYS measured per
    node of 8 H100 with 2K prompts; 0.8 of the network is what DeepEP's low-latency kernels reach on 128 GPUs (39 of
    50 GB/s). Measure your own.
    """

    input_tokens_per_second: float
    output_tokens_per_second: float
    context: int = 4989  # tokens in a decoding request's cache, on average (DeepSeek's service)
    prompt: int = 4096  # tokens
    seconds_per_token: float = 0.05  # the slowest output of one request that is good enough
    cache_hits: float = 0.0  # share of the input found in a prefix cache
    acceptance: tuple[float, ...] = ()  # of each draft, given that those before it were accepted
    prefill_gpus: int = 32  # of one unit
    decode_gpus: int = 144
    redundant_experts: int = 32  # copies per layer, in either unit
    precision: WirePrecision = "fp8"  # of weights and matrix products
    compute: float = 0.3  # shares of the peaks that are reached
    memory: float = 0.8
    network: float = 0.8
    headroom: float = 0.1  # of a GPU's memory, left for context, buffers and activations

    def check(self) -> None:
        """Raise `UserError` on a value out of range."""
        whole = ("context", "prompt", "prefill_gpus", "decode_gpus")
        for name in ("input_tokens_per_second", "output_tokens_per_second", "seconds_per_token", *whole):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("compute", "memory", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected a share of the peak above 0 and at most 1")
        for name, value in [("cache_hits", self.cache_hits), *(("acceptance", p) for p in self.acceptance)]:
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}, expected a share between 0 and 1")
        if not 0 <= self.headroom < 1:
            raise UserError(f"headroom is {self.headroom}, expected a share of the memory, at least 0 and below 1")
        if self.redundant_experts < 0:
            raise UserError(f"redundant_experts is {self.redundant_experts}, expected at least 0")


@dataclass(frozen=True)
class Unit:
    """One deployment unit of a phase, and how many of them the target needs."""

    gpus: int
    experts_per_gpu: int  # routed ones, copies included, per layer
    weight_bytes: float  # per GPU
    cache_bytes: float  # per GPU
    batch: int  # decoding requests per GPU; 0 in prefill
    seconds: dict[str, float]  # of one GPU, per step (decoding) or per token (prefill), by cause
    latency: float  # decoding: seconds per output token; prefill: until a lone prompt's first token
    tokens_per_second_per_gpu: float
    tokens_per_second_per_node: float
    units: int
    total_gpus: int


@dataclass(frozen=True)
class Speculation:
    """What drafts change, all else the same."""

    tokens_per_step: float
    speed: float  # of a request at the planned batch, relative to the same batch without drafts
    throughput: float | None  # tokens/s of a GPU within the latency target, relative to none; None: none misses it


@dataclass(frozen=True)
class Reference:
    """DeepSeek's published units (V3 on H800), and what this arithmetic says of them."""

    phase: str
    gpus: int
    experts_per_gpu: int
    weight_bytes: float
    planned_per_node: float  # tokens/s
    reported_per_node: float | None


@dataclass(frozen=True)
class ServePlan(Plan):
    """GPUs for a target load, by phase."""

    gpu: str
    service: Service
    cache_bytes_per_request: int
    prefill: Unit
    decode: Unit
    speculation: Speculation
    total_gpus: int
    references: tuple[Reference, ...]


def plan_serve(config: ModelConfig, gpu: GPU, service: Service) -> ServePlan:
    """Units for `service`. Raises `UserError` if a unit cannot hold the weights or meet the latency."""
    service.check()
    if service.acceptance and not config.num_nextn_predict_layers:
        raise UserError("acceptance is given, but this config has no MTP module to draft with: leave acceptance empty")
    prefill, decode = plan_prefill(config, gpu, service), plan_decode(config, gpu, service)
    plain = dataclasses.replace(service, acceptance=())
    throughput = None
    if step_seconds(config, gpu, plain, 1)["step"] <= service.seconds_per_token:
        throughput = decode.tokens_per_second_per_gpu / plan_decode(config, gpu, plain).tokens_per_second_per_gpu
    speed = step_seconds(config, gpu, plain, decode.batch)["step"] / decode.latency
    return ServePlan(
        gpu=gpu.name,
        service=service,
        cache_bytes_per_request=_cache_bytes(config, service),
        prefill=prefill,
        decode=decode,
        speculation=Speculation(speculative_tokens_per_step(service.acceptance), speed, throughput),
        total_gpus=prefill.total_gpus + decode.total_gpus,
        references=reference_units(service),
    )


def speculative_tokens_per_step(acceptance: Sequence[float]) -> float:
    """Expected tokens of one step: 1 + p_1 + p_1 p_2 + ...; 1 + p for a single draft."""
    tokens, reached = 1.0, 1.0
    for p in acceptance:
        reached *= p
        tokens += reached
    return tokens


def plan_prefill(config: ModelConfig, gpu: GPU, service: Service) -> Unit:
    """Prefill units for the part of the input that no cache holds."""
    gpus, experts = service.prefill_gpus, experts_per_gpu(config, service.prefill_gpus, service)
    weights = weight_bytes(config, experts, service)
    _require_room(gpu, service, weights, gpus, "prefill")
    layers = sorted(set(_layers(config, service)))
    compute = sum(
        block_seconds(config, gpu, i, context=service.prompt, precision=service.precision, efficiency=service.compute)
        for i in layers
    )
    moe_layers = sum(config.is_moe_layer(i) for i in layers)
    communication = 0.0
    if moe_layers:
        traffic = expert_traffic(config, gpu, gpus, service.precision)
        communication = moe_layers * traffic.seconds / service.network
    per_token = max(compute, communication)
    rate = 1 / per_token
    units = ceil(service.input_tokens_per_second * (1 - service.cache_hits) / rate / gpus)
    return Unit(
        gpus=gpus,
        experts_per_gpu=experts,
        weight_bytes=weights,
        cache_bytes=_cache_bytes(config, service, service.prompt),
        batch=0,
        seconds={"compute": compute, "communication": communication, "token": per_token},
        latency=service.prompt * per_token,
        tokens_per_second_per_gpu=rate,
        tokens_per_second_per_node=rate * gpu.gpus_per_node,
        units=units,
        total_gpus=units * gpus,
    )


def plan_decode(config: ModelConfig, gpu: GPU, service: Service) -> Unit:
    """Decode units with the largest batch that fits into memory and the latency target."""
    gpus, experts = service.decode_gpus, experts_per_gpu(config, service.decode_gpus, service)
    weights = weight_bytes(config, experts, service)
    room = _require_room(gpu, service, weights, gpus, "decode")
    tokens = speculative_tokens_per_step(service.acceptance)

    def latency(batch: int) -> float:
        return step_seconds(config, gpu, service, batch)["step"] / tokens

    if latency(1) > service.seconds_per_token:
        raise UserError(
            f"a decode unit of {gpus} {gpu.name} needs {seconds(latency(1))} for a token even of one request, more "
            f"than the {seconds(service.seconds_per_token)} asked for: spread it over more GPUs or allow more time"
        )
    low, high = 1, int(room // _cache_bytes(config, service))
    if not high:
        raise UserError(
            f"one request's cache of {service.context} tokens ({gib(_cache_bytes(config, service))}) does not fit into "
            f"the {gib(room)} that the weights leave on a {gpu.name}: spread the unit over more GPUs"
        )
    while low < high:  # the largest batch within the latency, which grows with the batch
        middle = (low + high + 1) // 2
        low, high = (middle, high) if latency(middle) <= service.seconds_per_token else (low, middle - 1)
    rate = low / latency(low)
    units = ceil(service.output_tokens_per_second / rate / gpus)
    return Unit(
        gpus=gpus,
        experts_per_gpu=experts,
        weight_bytes=weights,
        cache_bytes=low * _cache_bytes(config, service),
        batch=low,
        seconds=step_seconds(config, gpu, service, low),
        latency=latency(low),
        tokens_per_second_per_gpu=rate,
        tokens_per_second_per_node=rate * gpu.gpus_per_node,
        units=units,
        total_gpus=units * gpus,
    )


def step_seconds(config: ModelConfig, gpu: GPU, service: Service, batch: int) -> dict[str, float]:
    """Seconds of one decoding step with `batch` requests per GPU: "attention", "matrices", "communication", "step"."""
    layers = _layers(config, service)
    drafts, rows = len(service.acceptance), batch * (1 + len(service.acceptance))
    cache_read = batch * service.context * 2 * config.latent_dim / (gpu.memory_bandwidth * service.memory)
    scores = rows * attention_flops(config, service.context, absorbed=True) / (gpu.bf16_flops * service.compute)
    attention = len(layers) * max(cache_read, scores)

    experts = experts_per_gpu(config, service.decode_gpus, service)
    read = weight_bytes(config, experts, service) - 2 * embedding_parameters(config)  # the embedding is looked up
    flops = sum(linear.flops for layer in layers for linear in block_linears(config, layer))
    flops += (1 + drafts) * 2 * embedding_parameters(config)
    matrices = max(
        read / (gpu.memory_bandwidth * service.memory),
        rows * flops / (gpu.peak_flops(service.precision) * service.compute),
    )

    communication = 0.0
    if service.decode_gpus > 1:
        row = row_bytes(config, service.precision) + 2 * config.hidden_size
        rate = gpu.nvlink_bandwidth if service.decode_gpus <= gpu.gpus_per_node else gpu.network_bandwidth
        sent = rows * config.num_experts_per_tok * row * sum(config.is_moe_layer(layer) for layer in layers)
        communication = sent / (rate * service.network)
    return {
        "attention": attention,
        "matrices": matrices,
        "communication": communication,
        "step": max(attention + matrices, communication),
    }


def experts_per_gpu(config: ModelConfig, gpus: int, service: Service) -> int:
    """Routed experts and copies that the fullest GPU of a unit holds, per layer."""
    return ceil((config.n_routed_experts + service.redundant_experts * (gpus > 1)) / gpus)


def weight_bytes(config: ModelConfig, experts: int, service: Service) -> float:
    """Weights on one GPU: all but the routed experts, `experts` of those per layer, MTP modules if they draft."""
    total = 2.0 * (2 * embedding_parameters(config) + config.hidden_size)
    for layer in sorted(set(_layers(config, service))):
        total += 2 * sum(block_vectors(config, layer).values())
        for linear in block_linears(config, layer):
            size = linear.fp8_bytes if service.precision == "fp8" and linear.fp8 else 2 * linear.parameters
            total += size * (experts / linear.copies if linear.part == "routed experts" else 1)
    return total


def _layers(config: ModelConfig, service: Service) -> list[int]:
    """The blocks that a step runs; a draft deeper than there are MTP modules runs the last one again."""
    L, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    return [*range(L), *(L + min(d, modules - 1) for d in range(len(service.acceptance)))]


def _cache_bytes(config: ModelConfig, service: Service, tokens: int | None = None) -> int:
    layers = len(set(_layers(config, service)))
    return 2 * config.latent_dim * layers * (service.context if tokens is None else tokens)


def _require_room(gpu: GPU, service: Service, weights: float, gpus: int, phase: str) -> float:
    """Bytes that the weights leave free on a GPU; `UserError` if they do not fit."""
    usable = gpu.memory_bytes * (1 - service.headroom)
    if weights >= usable:
        raise UserError(
            f"a {phase} unit of {gpus} {gpu.name} puts {gib(weights)} of weights on a GPU that has {gib(usable)} for "
            f"them: spread it over more GPUs, or use GPUs with more memory"
        )
    return usable - weights


def reference_units(service: Service) -> tuple[Reference, ...]:
    """DeepSeek's units under the efficiencies of `service`: the report's minimal ones and the online service's.

    Online (open-infra-index, 24 h of February 2025, per node of 8 H800): 73.7K input tokens/s of which 56.3 % were
    cache hits; 14.8K output tokens/s at 20 to 22 tokens/s a request and 4,989 cached tokens. The report's 320-GPU
    unit treats the shared expert as a routed one; here 64 copies stand for its 64 GPUs of redundant and shared ones.
    """
    config, gpu = ModelConfig.preset("v3-671b"), find_gpu("H800")
    rates = {name: getattr(service, name) for name in ("compute", "memory", "network", "headroom")}
    online = Service(1, 1, seconds_per_token=1 / 21, **rates)
    rows = (
        ("prefill, report and online", plan_prefill(config, gpu, online), 73_700 * (1 - 0.563)),
        ("decode, online", plan_decode(config, gpu, online), 14_800.0),
        (
            "decode, report",
            plan_decode(config, gpu, dataclasses.replace(online, decode_gpus=320, redundant_experts=64)),
            None,
        ),
    )
    return tuple(
        Reference(name, unit.gpus, unit.experts_per_gpu, unit.weight_bytes, unit.tokens_per_second_per_node, reported)
        for name, unit, reported in rows
    )


def render(plan: ServePlan) -> RenderableType:
    """The plan as tables."""
    prefill, decode, drafts = plan.prefill, plan.decode, plan.speculation
    both = (prefill, decode)
    rows = [
        ("GPUs in a unit", *(str(unit.gpus) for unit in both)),
        ("routed experts a GPU, per layer", *(str(unit.experts_per_gpu) for unit in both)),
        ("weights a GPU", *(gib(unit.weight_bytes) for unit in both)),
        ("cache a GPU", f"{gib(prefill.cache_bytes)} a prompt", gib(decode.cache_bytes)),
        ("requests a GPU", "", str(decode.batch)),
        ("compute", f"{seconds(prefill.seconds['compute'])} a token", f"{seconds(_compute(decode))} a step"),
        ("communication", *(seconds(unit.seconds["communication"]) for unit in both)),
        ("latency", f"{seconds(prefill.latency)} to first token", f"{seconds(decode.latency)} a token"),
        ("tokens/s a GPU", *(f"{unit.tokens_per_second_per_gpu:,.0f}" for unit in both)),
        ("tokens/s a node", *(f"{unit.tokens_per_second_per_node:,.0f}" for unit in both)),
        ("units", *(str(unit.units) for unit in both)),
        ("GPUs", *(str(unit.total_gpus) for unit in both)),
    ]
    caption = f"cache of one request: {short(plan.cache_bytes_per_request, 'B')}"
    if plan.service.acceptance:
        gain = "" if drafts.throughput is None else f", a GPU's throughput {drafts.throughput:.2f}x"
        caption += f"; {drafts.tokens_per_step:.2f} tokens a step, a request {drafts.speed:.2f}x as fast{gain}"
    return Group(
        table(f"Service on {plan.total_gpus:,} {plan.gpu}", ("", "prefill", "decode"), rows, caption),
        table(
            "The same arithmetic on DeepSeek's service, tokens/s a node of 8 H800",
            ("unit", "GPUs", "experts a GPU", "weights", "planned", "reported"),
            [
                (
                    r.phase,
                    str(r.gpus),
                    str(r.experts_per_gpu),
                    gib(r.weight_bytes),
                    f"{r.planned_per_node:,.0f}",
                    "-" if r.reported_per_node is None else f"{r.reported_per_node:,.0f}",
                )
                for r in plan.references
            ],
            "reported: input not found in a cache, averages over a day; planned: a full service",
        ),
    )


def _compute(decode: Unit) -> float:
    return decode.seconds["attention"] + decode.seconds["matrices"]
