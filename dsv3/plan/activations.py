"""What the forward pass keeps for the backward pass, in bytes per token, part by part.

The list follows this package's modules tensor by tensor (a test holds it against what autograd really saves).
What happens to an entry depends on its kind:

| kind | what | bytes BF16 | bytes FP8 | selective |
|---|---|---|---|---|
| stream | the residual stream, input of a norm | 2 | 2 | kept |
| latent | output of a down-projection, input of a norm | 2 | 2 | kept |
| statistics | log-sum-exp, 1 / rms, scores, ids (bytes, not values) | 1 | 1 | kept |
| norm output | input of a linear | 2 | 1 + 4/128 | recomputed |
| up-projection | query, key, value | 2 | 2 | recomputed |
| attention output | input of `o_proj` | 2 | E5M6: 1.5 + 4/128 | kept |
| padded output | the same, as wide as the key, for the attention kernel | 2 | 0 | recomputed |
| router input | the gate's input in FP32 | 4 | 4 | recomputed |
| rows | tokens dispatched to experts | 2 | 1 + 4/128 | kept |
| SwiGLU input | gate and up side by side | 2 | 1 + 4/128 | kept |
| SwiGLU output | silu(gate) times up | 2 | 1 + 4/128 | recomputed |
| expert output | for the gradient of the routing weight | 2 | 2 | recomputed |

"Selective" is the report's choice (sections 3.2.3 and 3.3.3: norms, MLA up-projections and SwiGLU again in the
backward pass, activations cached in FP8, the attention output once in E5M6). It can only hold what the report's
memory holds if the routing weight's gradient is taken on the SwiGLU side, so that no expert output is kept.
"Full" keeps each block's input and runs the block again. The FP8 tiles are 1 x 128 with one FP32 scale.

Attention runs expanded through a fused kernel, which a value wider than the key would forgo (none in the family).
Rows are those of perfectly balanced experts: K per token. A rank whose experts are busier holds more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dsv3.config import ModelConfig
from dsv3.errors import UserError

Precision = Literal["fp32", "bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]

_FP8 = 1 + 4 / 128
_E5M6 = 1.5 + 4 / 128


@dataclass(frozen=True)
class _Kind:
    fp32: float
    bf16: float
    fp8: float
    selective: bool  # kept under selective recomputation


_KINDS = {
    "stream": _Kind(4, 2, 2, True),
    "latent": _Kind(4, 2, 2, True),
    "statistics": _Kind(1, 1, 1, True),
    "norm output": _Kind(4, 2, _FP8, False),
    "up-projection": _Kind(4, 2, 2, False),
    "attention output": _Kind(4, 2, _E5M6, True),
    "padded output": _Kind(4, 2, 0, False),
    "router input": _Kind(0, 4, 4, False),  # in FP32 training it is the norm's output itself
    "rows": _Kind(4, 2, _FP8, True),
    "SwiGLU input": _Kind(4, 2, _FP8, True),
    "SwiGLU output": _Kind(4, 2, _FP8, False),
    "expert output": _Kind(4, 2, 2, False),
}


def saved_activations(
    config: ModelConfig, layer: int, *, precision: Precision = "bf16", recompute: Recompute = "none"
) -> dict[str, float]:
    """Bytes per token that block `layer` keeps for its backward pass, by kind (see the table above).

    From `num_hidden_layers` on the block is an MTP module's, its own norms and projection included.
    """
    check_choice("precision", precision, Precision)
    check_choice("recompute", recompute, Recompute)
    tensors = _block_tensors(config, layer, precision)
    if recompute == "full":
        # An MTP module's inputs are two: the hidden state of the depth before, and the embedding.
        inputs = 2 if layer >= config.num_hidden_layers else 1
        tensors = [("stream", inputs * config.hidden_size)]
    out: dict[str, float] = {}
    for name, values in tensors:
        kind = _KINDS[name]
        if recompute != "selective" or kind.selective:
            out[name] = out.get(name, 0) + values * float(getattr(kind, precision))
    return {name: size for name, size in out.items() if size}


def head_activations(config: ModelConfig, *, precision: Precision = "bf16") -> float:
    """Bytes per token kept by one final norm and its cross-entropy: the norm's input, and d loss / d hidden."""
    itemsize = 4 if precision == "fp32" else 2
    return 2 * itemsize * config.hidden_size + 4


def head_gradient_bytes(config: ModelConfig) -> int:
    """What the chunked cross-entropy keeps per micro-batch whatever its length: the head's gradient in FP32."""
    return 4 * config.vocab_size * config.hidden_size


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise `UserError` unless `value` is one of the strings of the Literal `choices`."""
    known = get_args(choices)
    if value not in known:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _block_tensors(config: ModelConfig, layer: int, precision: Precision) -> list[tuple[str, float]]:
    """(kind, values per token) of everything a block saves, in the order of its forward pass."""
    c = config
    D, H = c.hidden_size, c.num_attention_heads
    q = c.q_lora_rank or 0
    # A narrower value is padded to the key's width; otherwise it is a view of what `kv_b_proj` made.
    padded = c.v_head_dim < c.qk_head_dim
    value = c.qk_head_dim if padded else c.qk_nope_head_dim + c.v_head_dim
    out: list[tuple[str, float]] = []
    if layer >= c.num_hidden_layers:
        # enorm and hnorm: inputs, 1 / rms, and the joined input of eh_proj.
        out += [("stream", 2 * D), ("statistics", 8), ("norm output", 2 * D)]
    out += [
        ("stream", D),  # input_layernorm
        ("norm output", D),
        ("latent", q + c.latent_dim),
        ("norm output", q + c.kv_lora_rank),
        ("statistics", 4 * (2 if q == 0 else 3)),  # 1 / rms of each norm so far
        ("up-projection", H * (2 * c.qk_head_dim + value)),
        ("attention output", H * c.v_head_dim),
        ("statistics", 4 * H),  # log-sum-exp
        ("stream", D),  # post_attention_layernorm
        ("statistics", 4),
    ]
    if padded:
        out.append(("padded output", H * c.qk_head_dim))
    if not c.is_moe_layer(layer) or c.n_shared_experts or precision == "fp32":
        out.append(("norm output", D))  # routed experts alone keep their rows and the gate's FP32 copy instead
    if not c.is_moe_layer(layer):
        return out + _swiglu_tensors(c.intermediate_size)
    E, K, F = c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size
    out += [
        ("router input", D),
        # FP32 scores; int64 ranking of all experts, of which the chosen ids are a view; per choice an FP32 weight
        # and the int64 place of its row; to normalise, the chosen scores and their sum in FP32.
        ("statistics", 4 * E + 8 * E + 12 * K + c.norm_topk_prob * (4 * K + 4)),
        ("rows", K * D),
        ("expert output", K * D),
        *_swiglu_tensors(K * F),
    ]
    if c.n_shared_experts:
        out += _swiglu_tensors(c.n_shared_experts * F)
    return out


def _swiglu_tensors(width: int) -> list[tuple[str, float]]:
    return [("SwiGLU input", 2 * width), ("SwiGLU output", width)]
