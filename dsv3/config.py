"""What a model *is*: `ModelConfig`, its checks and its presets.

Fields carry the names of the Hugging Face `config.json` of DeepSeek-V3, so that a reader of one reads the
other. The recipe of a training run (learning rate, gamma of the bias update, weight of the MTP loss) is not
here but in `dsv3.train.config`: a model has a shape whether or not anyone trains it. This file imports no
tensor library; the planner and the command line read it without paying for one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from dsv3.errors import UserError

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) as the DeepSeek configs spell it; section 4.3 of the V3 report.

    `factor` s stretches a context of `original_max_position_embeddings` L0 tokens to s x L0. `mscale_all_dim`
    raises the softmax temperature, `mscale / mscale_all_dim` multiplies cos and sin (1 for V3).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    type: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(field.name == "type" or number, f"rope_scaling.{field.name}", value, "a finite number")
        _require(self.type == "yarn", "rope_scaling.type", self.type, "'yarn'")
        _require(self.factor >= 1, "rope_scaling.factor", self.factor, "at least 1")
        _require(
            self.original_max_position_embeddings >= 1,
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            "at least 1",
        )
        _require(
            self.beta_fast > self.beta_slow > 0,
            "rope_scaling.beta_fast",
            self.beta_fast,
            f"above beta_slow ({self.beta_slow}), both positive",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a DeepSeek-V3-like model; the defaults are those of the 671B model.

    Raises `UserError`, naming the field, if a value is out of range or contradicts another.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: ScoringFunc = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    # What the report trained with. The released config.json carries 0.02 and 0.001 instead (left-overs).
    initializer_range: float = 0.006
    aux_loss_alpha: float = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name in (
            "vocab_size hidden_size num_hidden_layers moe_layer_freq intermediate_size moe_intermediate_size "
            "num_experts_per_tok n_group topk_group num_attention_heads kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim max_position_embeddings n_routed_experts"
        ).split():
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in "first_k_dense_replace n_shared_experts num_nextn_predict_layers aux_loss_alpha".split():
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in "rms_norm_eps rope_theta routed_scaling_factor initializer_range".split():
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(
            self.q_lora_rank is None or self.q_lora_rank >= 1, "q_lora_rank", self.q_lora_rank, "null or at least 1"
        )
        _require(
            self.num_key_value_heads == self.num_attention_heads,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"equal to num_attention_heads ({self.num_attention_heads}): MLA has one key per head",
        )
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "even (RoPE turns pairs)")
        _require(
            self.scoring_func in ("sigmoid", "softmax"), "scoring_func", self.scoring_func, "'sigmoid' or 'softmax'"
        )
        _require(
            self.topk_method in ("noaux_tc", "group_limited_greedy", "greedy"),
            "topk_method",
            self.topk_method,
            "'noaux_tc', 'group_limited_greedy' or 'greedy'",
        )
        _require(
            self.n_routed_experts % self.n_group == 0,
            "n_group",
            self.n_group,
            f"a divisor of n_routed_experts ({self.n_routed_experts})",
        )
        _require(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group ({self.n_group})")
        group_size = self.n_routed_experts // self.n_group
        _require(
            self.topk_method != "noaux_tc" or self.n_group == 1 or group_size >= 2,
            "n_group",
            self.n_group,
            f"at most n_routed_experts / 2 ({self.n_routed_experts // 2}): a group is scored by its best two experts",
        )
        reachable = self.topk_group * group_size if self.topk_method != "greedy" else self.n_routed_experts
        _require(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most {reachable}, the experts in the {self.topk_group} groups that a token may reach",
        )
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < self.vocab_size, name, value, f"null or in [0, {self.vocab_size})")

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key, d_h + d_h^R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: c_KV and k_R, d_c + d_h^R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        """Blocks in all: the main model's, then one for each MTP module."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has a DeepSeekMoE; MTP blocks count on from `num_hidden_layers`."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked anew. Raises `UserError` on an unknown field."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UserError(f"ModelConfig has no field '{name}'; it has {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The preset called `name` (see `PRESETS`)."""
        if name not in PRESETS:
            raise UserError(f"there is no preset '{name}'; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "int | None": ((int, NoneType), "a whole number or null"),
    "float": ((int, float), "a finite number"),
    "bool": (bool, "true or false"),
    "RopeScaling | None": ((RopeScaling, NoneType), "a RopeScaling or null"),
}


def _check_type(field: dataclasses.Field[Any], value: object) -> None:
    """Before any comparison, so that a string from a file is refused by name and not by a traceback."""
    if field.type in _TYPES:
        types, expected = _TYPES[field.type]
        ok = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        _require(ok and (not isinstance(value, float) or math.isfinite(value)), field.name, value, expected)
    else:
        _require(isinstance(value, str), field.name, value, "a string")


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"config field '{field}' is {value!r}, expected {expected}")


_V3_YARN = RopeScaling(factor=40, original_max_position_embeddings=4096)

_BENCH = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    intermediate_size=1408,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    initializer_range=0.02,
)

PRESETS: dict[str, ModelConfig] = {
    # The demo: every part of the architecture, small enough to learn something in minutes on two cores.
    "nano": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=704,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.03,
    ),
    # The tests: the smallest model in which every rule of the architecture still bites.
    "micro": ModelConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.05,
    ),
    # The benchmarks against peers.
    "bench": _BENCH,
    "bench-576": _BENCH.replace(
        vocab_size=129280, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    # DeepSeek-V2-Lite's shape with V3's router and one MTP module; scale as in Moonlight, the same shape trained so.
    "v3-16b": ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
    ),
    # DeepSeek-V2's shape and routing: softmax scores, groups ranked by their best expert, no bias, no MTP.
    "v3-236b": ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        first_k_dense_replace=1,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_shared_experts=2,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        num_nextn_predict_layers=0,
        max_position_embeddings=163840,
        rope_scaling=dataclasses.replace(_V3_YARN, mscale=0.707, mscale_all_dim=0.707),
    ),
    # DeepSeek-V3 as released.
    "v3-671b": ModelConfig(max_position_embeddings=163840, rope_scaling=_V3_YARN),
}
