"""DeepSeek-V3 once more, slow and obvious: loops over sequences, tokens, heads, pairs and experts.

Written from the equations of the report and not from the package, of which only `ModelConfig` and the names of the
weights are used. Everything is differentiable: weights that require a gradient get one. Vectors carry their
widths as suffixes (D model, H heads, C latent, R RoPE, E experts, V vocabulary); lists run over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig

Weights = Mapping[str, Tensor]


def weights_of(model: nn.Module, *, grad: bool = False) -> dict[str, Tensor]:
    """FP64 copies of a model's parameters and buffers by name; with `grad`, parameters are leaves of their own."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: tensor.detach().double().clone().requires_grad_(grad and name in parameters)
        for name, tensor in model.state_dict().items()
    }


# Positions (spec section 3)


def frequency(config: ModelConfig, pair: int) -> float:
    """Radians that pair (2i, 2i+1) turns per position."""
    R, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    plain = theta ** (-2 * pair / R)
    if yarn is None:
        return plain

    def correction(turns: float) -> float:
        return R * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), R - 1)
    ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
    return ramp * plain / yarn.factor + (1 - ramp) * plain


def mscale(factor: float, weight: float) -> float:
    return 1 + 0.1 * weight * math.log(factor)


def rope(x_R: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Each pair as a complex number, times e^(i angle)."""
    yarn, size = config.rope_scaling, 1.0
    if yarn is not None:
        size = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    out = []
    for pair in range(config.qk_rope_head_dim // 2):
        angle = position * frequency(config, pair)
        cos, sin = size * math.cos(angle), size * math.sin(angle)
        a, b = x_R[2 * pair], x_R[2 * pair + 1]
        out += [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(out)


# Blocks (eq. 1-16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def swiglu(x_D: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
    F = down_DF.shape[1]
    gate, up = gate_up_GD[:F] @ x_D, gate_up_GD[F:] @ x_D
    return down_DF @ (gate / (1 + torch.exp(-gate)) * up)


def latents(config: ModelConfig, W: Weights, attn: str, x_D: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """What is cached of one token: the normed c_KV and the rotated k_R. `attn` ends in a dot."""
    both = W[attn + "kv_a_proj_with_mqa.weight"] @ x_D
    c_C = rms_norm(both[: config.kv_lora_rank], W[attn + "kv_a_layernorm.weight"], config.rms_norm_eps)
    return c_C, rope(both[config.kv_lora_rank :], position, config)


def attention(config: ModelConfig, W: Weights, attn: str, xs: Sequence[Tensor]) -> list[Tensor]:
    """Eq. 1-11, head by head and query by query. `attn` ends in a dot."""
    H, N, K, V = config.num_attention_heads, config.qk_nope_head_dim, config.qk_head_dim, config.v_head_dim
    scale = 1 / math.sqrt(K)
    if config.rope_scaling is not None:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    cached = [latents(config, W, attn, x_D, j) for j, x_D in enumerate(xs)]
    heads = W[attn + "kv_b_proj.weight"].split(N + V)
    keys = [[torch.cat((W_h[:N] @ c_C, k_R)) for c_C, k_R in cached] for W_h in heads]
    values = [[W_h[N:] @ c_C for c_C, _ in cached] for W_h in heads]
    out = []
    for i, x_D in enumerate(xs):
        if config.q_lora_rank is None:
            q = W[attn + "q_proj.weight"] @ x_D
        else:
            c_Q = rms_norm(W[attn + "q_a_proj.weight"] @ x_D, W[attn + "q_a_layernorm.weight"], config.rms_norm_eps)
            q = W[attn + "q_b_proj.weight"] @ c_Q
        answers = []
        for h in range(H):
            q_h = q[h * K : (h + 1) * K]
            q_h = torch.cat((q_h[:N], rope(q_h[N:], i, config)))
            probs = torch.softmax(torch.stack([q_h @ k * scale for k in keys[h][: i + 1]]), 0)
            answers.append(sum(p * v for p, v in zip(probs, values[h], strict=False)))
        out.append(W[attn + "o_proj.weight"] @ torch.cat(answers))
    return out


def best(values: Sequence[float], k: int, among: Iterable[int] | None = None) -> list[int]:
    """Where the k largest values are, largest first, the lower index first among equals."""
    candidates = range(len(values)) if among is None else among
    return sorted(candidates, key=lambda i: (-values[i], i))[:k]


def route(scores: Sequence[float], bias: Sequence[float] | None, config: ModelConfig) -> list[int]:
    """The experts of one token (spec section 4, steps 2-4)."""
    selection = list(scores) if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    if config.topk_method == "greedy":
        return best(selection, config.num_experts_per_tok)
    size = config.n_routed_experts // config.n_group
    members = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    counted = 2 if config.topk_method == "noaux_tc" and config.n_group > 1 else 1
    worth = [sum(selection[e] for e in best(selection, counted, group)) for group in members]
    kept = [e for g in best(worth, config.topk_group) for e in members[g]]
    return best(selection, config.num_experts_per_tok, kept)


def scores_of(config: ModelConfig, W: Weights, mlp: str, x_D: Tensor) -> Tensor:
    logits_E = W[mlp + "router.weight"] @ x_D
    return 1 / (1 + torch.exp(-logits_E)) if config.scoring_func == "sigmoid" else torch.softmax(logits_E, 0)


def gates(scores_E: Tensor, chosen: Sequence[int], config: ModelConfig) -> list[Tensor]:
    """g of each chosen expert (step 5): the unbiased scores only."""
    total = sum(scores_E[e] for e in chosen) if config.norm_topk_prob else 1.0
    return [scores_E[e] / total * config.routed_scaling_factor for e in chosen]


@dataclass
class Layer:
    """What one MoE layer's router did with one sequence."""

    scores: list[Tensor] = field(default_factory=list)  # [E] of each token
    chosen: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    def counts(self, experts: int) -> list[int]:
        return [sum(e in ids for ids in self.chosen) for e in range(experts)]


def block(
    config: ModelConfig, W: Weights, prefix: str, layer: int, hs: Sequence[Tensor]
) -> tuple[list[Tensor], Layer | None]:
    """One block over one sequence. `prefix` ends in a dot."""
    eps, mlp = config.rms_norm_eps, prefix + "mlp."
    normed = [rms_norm(h, W[prefix + "input_layernorm.weight"], eps) for h in hs]
    us = [h + o for h, o in zip(hs, attention(config, W, prefix + "self_attn.", normed), strict=True)]
    xs = [rms_norm(u, W[prefix + "post_attention_layernorm.weight"], eps) for u in us]
    if layer < config.first_k_dense_replace or layer % config.moe_layer_freq != 0:
        gate_up, down = W[mlp + "gate_up_proj.weight"], W[mlp + "down_proj.weight"]
        return [u + swiglu(x, gate_up, down) for u, x in zip(us, xs, strict=True)], None
    seen, out = Layer(), []
    bias = W.get(mlp + "router.e_score_correction_bias")
    F = config.moe_intermediate_size
    for u, x in zip(us, xs, strict=True):
        scores_E = scores_of(config, W, mlp, x)
        chosen = route(scores_E.tolist(), None if bias is None else bias.tolist(), config)
        g = gates(scores_E, chosen, config)
        for weight, e in zip(g, chosen, strict=True):
            u = u + weight * swiglu(x, W[mlp + "experts.gate_up_proj"][e], W[mlp + "experts.down_proj"][e])
        for s in range(config.n_shared_experts):
            gate_up, down = W[mlp + "shared_experts.gate_up_proj.weight"], W[mlp + "shared_experts.down_proj.weight"]
            assert down.shape[1] == config.n_shared_experts * F
            gate, up = gate_up.chunk(2)
            mine = slice(s * F, (s + 1) * F)  # shared expert s of the N_s that are stored as one wide MLP
            u = u + swiglu(x, torch.cat((gate[mine], up[mine])), down[:, mine])
        out.append(u)
        seen.scores.append(scores_E)
        seen.chosen.append(chosen)
        seen.weights.append([w.item() for w in g])
    return out, seen


# The whole model (eq. 21-23 for the MTP modules)


@dataclass
class Said:
    """What the model says of one sequence."""

    logits: list[Tensor]  # [V] of each position
    mtp_logits: list[list[Tensor]]  # by depth, from depth 1
    layers: dict[str, Layer]  # MoE layers, "layers.3", "mtp.0"


def say(config: ModelConfig, W: Weights, tokens: Sequence[int]) -> Said:
    layers: dict[str, Layer] = {}
    embedded = [W["embed_tokens.weight"][t] for t in tokens]
    hs = list(embedded)
    for i in range(config.num_hidden_layers):
        hs, seen = block(config, W, f"layers.{i}.", i, hs)
        if seen is not None:
            layers[f"layers.{i}"] = seen
    eps = config.rms_norm_eps
    hs = [rms_norm(h, W["norm.weight"], eps) for h in hs]
    head = W["lm_head.weight"]
    said = Said([head @ h for h in hs], [], layers)
    for k in range(1, config.num_nextn_predict_layers + 1):
        name = f"mtp.{k - 1}."
        joined = []
        for i in range(max(len(tokens) - k, 0)):
            e = rms_norm(embedded[i + k], W[name + "enorm.weight"], eps)
            h = rms_norm(hs[i], W[name + "hnorm.weight"], eps)
            joined.append(W[name + "eh_proj.weight"] @ torch.cat((e, h)))
        hs, seen = block(config, W, name + "block.", config.num_hidden_layers + k - 1, joined)
        if seen is not None and joined:
            layers[name[:-1]] = seen
        hs = [rms_norm(h, W[name + "norm.weight"], eps) for h in hs]
        said.mtp_logits.append([head @ h for h in hs])
    return said


# Losses (eq. 17-20, 24-25)


def sequence_loss(scores: Sequence[Tensor], top_k: int) -> Tensor:
    """sum_i f_i P_i of one sequence, without alpha."""
    T, E = len(scores), len(scores[0])
    total = torch.zeros((), dtype=scores[0].dtype)
    for i in range(E):
        f = E / (top_k * T) * sum(i in best(s.tolist(), top_k) for s in scores)
        P = sum(s[i] / s.sum() for s in scores) / T
        total = total + f * P
    return total


def surprise(logits_V: Tensor, target: int) -> Tensor:
    return torch.logsumexp(logits_V, 0) - logits_V[target]


def targets(tokens: Sequence[int], depth: int, eos: int | None) -> list[int | None]:
    """What depth k (0: the main model) predicts at each input position; None past the end of the document.

    The last of `tokens` is a target only.
    """
    out: list[int | None] = []
    for i in range(len(tokens) - 1 - depth):
        same_document = eos not in tokens[i : i + depth + 1]
        out.append(tokens[i + depth + 1] if same_document else None)
    return out


@dataclass
class Step:
    """The losses of a whole batch, and what is minimised."""

    total: Tensor
    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    counts: dict[str, list[int]]


def step(config: ModelConfig, W: Weights, batch: Sequence[Sequence[int]], eos: int | None, mtp_weight: float) -> Step:
    """Each row of `batch` has one token more than the model reads."""
    said = [say(config, W, row[:-1]) for row in batch]
    D = config.num_nextn_predict_layers
    means = []
    for depth in range(D + 1):
        terms = []
        for row, answer in zip(batch, said, strict=True):
            logits = answer.logits if depth == 0 else answer.mtp_logits[depth - 1]
            terms += [
                surprise(logits[i], target) for i, target in enumerate(targets(row, depth, eos)) if target is not None
            ]
        means.append(sum(terms) / len(terms))
    total = means[0] + sum(mtp_weight / D * mean for mean in means[1:])
    balances = []
    for name in said[0].layers:
        rows = [sequence_loss(answer.layers[name].scores, config.num_experts_per_tok) for answer in said]
        balances.append(sum(rows) / len(rows))
        total = total + config.aux_loss_alpha * balances[-1]
    counts = {
        name: [sum(row) for row in zip(*(s.layers[name].counts(config.n_routed_experts) for s in said), strict=True)]
        for name in said[0].layers
    }
    balance = sum(balances) / len(balances) if balances else torch.zeros(())
    return Step(total, means[0], means[1:], balance, counts)
