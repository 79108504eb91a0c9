"""`plan model`: what a config costs before anything runs: parameters, FLOPs, KV cache, checkpoint size.

One list of weight matrices (`block_linears`) drives all four, so that they cannot disagree.

How things are counted:
- *Parameters* include norms, the gate and its selection bias. *Activated* are those that one token touches:
  all but the routed experts it did not choose. The published numbers of V3 come out exactly.
- *FLOPs*: a matrix product of n multiply-adds is 2n; norms, softmax, RoPE, the weighted sum of experts and the
  embedding's lookup count nothing.
  Training is three times the forward pass (each product has two in the backward pass), recomputation excluded.
- *Attention* at context S, per head: scores and weighted sum over the keys a query looks at. "Causal" counts the
  lower triangle with its diagonal, (S + 1) / 2 keys on average; "full" counts all S, as some trainers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rich.console import Group, RenderableType

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.display import Plan, short, table

FP8_BLOCK = 128  # weights are scaled per 128 x 128 block (report, section 3.3)


@dataclass(frozen=True)
class Linear:
    """A weight [out_features, in_features] of a block: held `copies` times, of which a token meets `active`."""

    part: str
    out_features: int
    in_features: int
    copies: int = 1
    active: int = 1
    fp8: bool = True  # False: stays BF16 or FP32 under FP8 training and in FP8 checkpoints

    @property
    def parameters(self) -> int:
        return self.copies * self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """Forward FLOPs of one token."""
        return 2 * self.active * self.out_features * self.in_features

    @property
    def fp8_bytes(self) -> int:
        """E4M3 weights with one FP32 scale per 128 x 128 block, the last block of a side partial."""
        blocks = ceil(self.out_features / FP8_BLOCK) * ceil(self.in_features / FP8_BLOCK)
        return self.parameters + 4 * self.copies * blocks


def block_linears(config: ModelConfig, layer: int) -> tuple[Linear, ...]:
    """The matrices of block `layer` as a checkpoint has them (gate and up apart, one per expert).

    From `num_hidden_layers` on these are the MTP modules' blocks, `eh_proj` included (part "mtp projection").
    """
    c = config
    D, H = c.hidden_size, c.num_attention_heads
    out: list[Linear] = []
    if c.q_lora_rank is None:
        out.append(Linear("attention", H * c.qk_head_dim, D))
    else:
        out += [Linear("attention", c.q_lora_rank, D), Linear("attention", H * c.qk_head_dim, c.q_lora_rank)]
    out += [
        Linear("attention", c.latent_dim, D),
        Linear("attention", H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        Linear("attention", D, H * c.v_head_dim),
    ]
    if c.is_moe_layer(layer):
        E, K, F = c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size
        out += [Linear("router", E, D, fp8=False), *_swiglu("routed experts", D, F, E, K)]
        if c.n_shared_experts:
            out += _swiglu("shared experts", D, c.n_shared_experts * F)
    else:
        out += _swiglu("dense FFN", D, c.intermediate_size)
    if layer >= c.num_hidden_layers:
        out.append(Linear("mtp projection", D, 2 * D, fp8=False))
    return tuple(out)


def _swiglu(part: str, dim: int, width: int, copies: int = 1, active: int = 1) -> list[Linear]:
    up = Linear(part, width, dim, copies, active)
    return [up, up, Linear(part, dim, width, copies, active)]


def block_vectors(config: ModelConfig, layer: int) -> dict[str, int]:
    """Parameters of block `layer` that are no matrices, by part: norm weights and the gate's selection bias.

    An MTP block counts its module's three norms (`enorm`, `hnorm`, and the one before the head).
    """
    D = config.hidden_size
    out = {"attention": (config.q_lora_rank or 0) + config.kv_lora_rank, "norms": 2 * D}
    if config.is_moe_layer(layer) and config.topk_method == "noaux_tc":
        out["router"] = config.n_routed_experts
    if layer >= config.num_hidden_layers:
        out["norms"] += 3 * D
    return out


def block_parameters(config: ModelConfig, layer: int) -> dict[str, int]:
    """All parameters of block `layer`, by part."""
    out = block_vectors(config, layer)
    for linear in block_linears(config, layer):
        out[linear.part] = out.get(linear.part, 0) + linear.parameters
    return out


def embedding_parameters(config: ModelConfig) -> int:
    """Vocabulary x width: the embedding's, and the untied output head's as well."""
    return config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, keys: float, *, absorbed: bool = False) -> float:
    """Forward FLOPs of one token's scores and weighted sum over `keys` positions in one block.

    Expanded (training, prefill): 2 H (d_h + d_h^R + d_v) per key. Absorbed (decoding, on latents): 2 H (2 d_c + d_h^R).
    The projections around them are matrices of the block and cost the same either way.
    """
    if absorbed:
        return 2 * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank) * keys
    return 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * keys


def causal_keys(context: int) -> float:
    """Keys that a token of a sequence of `context` tokens looks at, on average, itself included."""
    return (context + 1) / 2


@dataclass(frozen=True)
class Count:
    """Parameters: all, and those one token touches."""

    total: int
    activated: int


@dataclass(frozen=True)
class Flops:
    """Per token. `forward` and `training` are causal; `parts` add up to `forward`."""

    context: int
    parts: dict[str, float]
    forward: float
    forward_full_attention: float
    training: float
    training_full_attention: float
    mtp_training: float  # what the MTP modules add to `training`, each with its pass through the head


@dataclass(frozen=True)
class CacheSize:
    """KV cache in BF16: bytes per token, and of one sequence of `context` tokens."""

    context: int
    bytes_per_token: int
    bytes_per_context: int
    values_per_layer: int
    mha_values_per_layer: int
    mha_ratio: float  # how many times more MHA of the same heads caches
    gqa_groups_of_equal_size: float  # GQA with so many key-value heads would cache as much
    others: dict[str, int]  # bytes per token of MHA, GQA with 8 groups, MQA, of the same head widths and layers


@dataclass(frozen=True)
class ModelPlan(Plan):
    """Everything `plan model` knows. Counts are exact; MTP is always apart."""

    parameters: dict[str, Count]  # main model, by part
    total: int
    activated: int  # without embedding and head
    activated_with_head: int
    activated_with_head_and_embedding: int
    mtp_modules: tuple[int, ...]  # parameters of each, without the main model's embedding and head that it shares
    total_with_mtp: int
    attention_per_layer: int
    moe_layers: int
    experts_per_layer: int  # shared ones included, as in the two below
    experts: int
    active_experts: int  # of one token, over all layers
    flops: Flops
    cache: CacheSize
    checkpoint_bytes: dict[str, int]  # "fp8", "bf16": tensors of the Hugging Face checkpoint, MTP included


def plan_model(config: ModelConfig, *, context: int = 4096) -> ModelPlan:
    """Count `config`, with attention and cache at `context` tokens. Raises `UserError` if context is below 1."""
    if context < 1:
        raise UserError(f"context is {context} tokens, expected at least 1")
    parameters = {"embedding": Count(embedding_parameters(config), embedding_parameters(config))}
    for layer in range(config.num_hidden_layers):
        for part, total in block_parameters(config, layer).items():
            active = total
            if part == "routed experts":
                active = total // config.n_routed_experts * config.num_experts_per_tok
            seen = parameters.get(part, Count(0, 0))
            parameters[part] = Count(seen.total + total, seen.activated + active)
    norms = parameters["norms"]
    parameters["norms"] = Count(norms.total + config.hidden_size, norms.activated + config.hidden_size)
    parameters["head"] = Count(embedding_parameters(config), embedding_parameters(config))

    total = sum(count.total for count in parameters.values())
    activated_both = sum(count.activated for count in parameters.values())
    mtp = tuple(
        sum(block_parameters(config, layer).values())
        for layer in range(config.num_hidden_layers, config.num_layers_with_mtp)
    )
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    experts_per_layer = config.n_routed_experts + config.n_shared_experts
    return ModelPlan(
        parameters=parameters,
        total=total,
        activated=activated_both - 2 * embedding_parameters(config),
        activated_with_head=activated_both - embedding_parameters(config),
        activated_with_head_and_embedding=activated_both,
        mtp_modules=mtp,
        total_with_mtp=total + sum(mtp),
        attention_per_layer=block_parameters(config, 0)["attention"],
        moe_layers=moe_layers,
        experts_per_layer=experts_per_layer,
        experts=moe_layers * experts_per_layer,
        active_experts=moe_layers * (config.num_experts_per_tok + config.n_shared_experts),
        flops=count_flops(config, context),
        cache=cache_size(config, context),
        checkpoint_bytes={precision: checkpoint_bytes(config, precision) for precision in ("fp8", "bf16")},
    )


def count_flops(config: ModelConfig, context: int) -> Flops:
    """FLOPs per token of sequences of `context` tokens, averaged over their positions."""
    parts: dict[str, float] = {}
    for layer in range(config.num_hidden_layers):
        for linear in block_linears(config, layer):
            parts[linear.part] = parts.get(linear.part, 0) + linear.flops
    head = 2 * embedding_parameters(config)
    core = attention_flops(config, causal_keys(context))
    full_extra = attention_flops(config, context) - core
    parts["attention over keys"] = config.num_hidden_layers * core
    parts["head"] = head
    forward = sum(parts.values())
    full = forward + config.num_hidden_layers * full_extra
    mtp_forward = sum(
        sum(linear.flops for linear in block_linears(config, layer)) + core + head
        for layer in range(config.num_hidden_layers, config.num_layers_with_mtp)
    )
    return Flops(context, parts, forward, full, 3 * forward, 3 * full, 3 * mtp_forward)


def cache_size(config: ModelConfig, context: int) -> CacheSize:
    """KV cache of the main model (an MTP module that drafts adds one layer's share)."""
    layers, itemsize = config.num_hidden_layers, 2
    per_head = config.qk_nope_head_dim + config.v_head_dim  # a plain head needs no extra RoPE dimensions
    mha = config.num_attention_heads * per_head
    groups = {"MHA": config.num_attention_heads, "GQA-8": min(8, config.num_attention_heads), "MQA": 1}
    per_token = config.latent_dim * itemsize * layers
    return CacheSize(
        context=context,
        bytes_per_token=per_token,
        bytes_per_context=per_token * context,
        values_per_layer=config.latent_dim,
        mha_values_per_layer=mha,
        mha_ratio=mha / config.latent_dim,
        gqa_groups_of_equal_size=config.latent_dim / per_head,
        others={name: heads * per_head * itemsize * layers for name, heads in groups.items()},
    )


def checkpoint_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of all tensors of a checkpoint in the released format; file headers (0.002 % for V3) come on top.

    "fp8": matrices as E4M3 with FP32 block scales; embedding, head, gate, norms and `eh_proj` BF16. "bf16":
    all BF16. The selection bias is FP32 in both, and every MTP layer repeats embedding and head.
    """
    if precision not in ("fp8", "bf16"):
        raise UserError(f"checkpoint precision is '{precision}', expected 'fp8' or 'bf16'")
    ends = 2 * 2 * embedding_parameters(config)
    total = ends + 2 * config.hidden_size + config.num_nextn_predict_layers * ends
    for layer in range(config.num_layers_with_mtp):
        for linear in block_linears(config, layer):
            total += linear.fp8_bytes if precision == "fp8" and linear.fp8 else 2 * linear.parameters
        for part, size in block_vectors(config, layer).items():
            total += (4 if part == "router" else 2) * size
    return total


def render(plan: ModelPlan) -> RenderableType:
    """The plan as tables."""
    f, cache = plan.flops, plan.cache
    parts = [
        (name, f"{count.total:,}", f"{count.activated:,}", f"{count.total / plan.total:.1%}")
        for name, count in plan.parameters.items()
    ]
    parts.append(("total", f"{plan.total:,}", f"{plan.activated_with_head_and_embedding:,}", ""))
    parts.append(("  without embedding", "", f"{plan.activated_with_head:,}", ""))
    parts.append(("  without embedding and head", "", f"{plan.activated:,}", ""))
    parts += [(f"MTP module {k}", f"{size:,}", "", "") for k, size in enumerate(plan.mtp_modules, 1)]
    flops = [(name, short(value, "FLOP"), f"{value / f.forward:.1%}") for name, value in f.parts.items()]
    flops += [
        ("forward", short(f.forward, "FLOP"), ""),
        ("training (3 x forward)", short(f.training, "FLOP"), ""),
        ("  with full attention counted", short(f.training_full_attention, "FLOP"), ""),
        ("  MTP adds", short(f.mtp_training, "FLOP"), ""),
    ]
    caches = [("MLA", cache.bytes_per_token), *cache.others.items()]
    return Group(
        table(
            "Parameters",
            ("part", "all", "one token's", "share"),
            parts,
            f"{plan.attention_per_layer:,} in one MLA; {plan.experts:,} experts, {plan.active_experts} active",
        ),
        table(f"FLOPs per token, context {f.context:,}, causal", ("part", "forward", "share"), flops),
        table(
            "KV cache, BF16",
            ("attention", "a token", f"{cache.context:,} tokens"),
            [(name, short(size, "B"), short(size * cache.context, "B")) for name, size in caches],
        ),
        table(
            "Checkpoint, MTP included",
            ("format", "size"),
            [(name.upper(), short(size, "B")) for name, size in plan.checkpoint_bytes.items()],
        ),
    )
