"""`config.json` in the schema of the official DeepSeek-V3 release, in and out.

The official schema is written, word for word, because it is the only one that transformers, vLLM, SGLang,
llama.cpp and mlx-lm all read alike. Read is that one and what transformers 5 writes (`rope_parameters` in place
of `rope_scaling` and `rope_theta`, `dtype` in place of `torch_dtype`). A field that would change the model and
is not understood is an error that names it: a model that is silently another one is worse than none.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsv3.config import ModelConfig, RopeScaling
from dsv3.errors import UserError
from dsv3.ops.fp8 import BLOCK

CONFIG_FILE = "config.json"

QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}

# The routers that the two official model types mean; a file may leave these fields out.
_FAMILY_ROUTING: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}
_ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

# Fields that have one value here. A file that says otherwise describes another model.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}
# Fields that say nothing about the function the model computes.
_IGNORED = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Values for fields that older or newer files leave out. What decides the function and leaves no trace in the
# tensors (n_group, say) is not among them.
_ABSENT: dict[str, Any] = {
    "aux_loss_alpha": ModelConfig.aux_loss_alpha,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": ModelConfig.initializer_range,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}
_NULL: dict[str, Any] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}
_PLAIN_FIELDS = {f.name: f.type for f in dataclasses.fields(ModelConfig) if not f.name.startswith("rope_")}
_ROPE_FIELDS = {f.name for f in dataclasses.fields(RopeScaling)} - {"type"}


def config_to_hf(config: ModelConfig, *, dtype: torch.dtype, fp8: bool = False) -> dict[str, Any]:
    """The official config.json of `config`. dtype: of the tensors that are not FP8; fp8: Linear weights are FP8 blocks.

    Warns where readers other than dsv3 would run another model without a word (`_departures`).
    """
    model_type = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    if departures := _departures(config, model_type):
        warnings.warn(
            f"no released model is like this one, and readers other than dsv3 may run another: {'; '.join(departures)}",
            stacklevel=2,
        )
    hf: dict[str, Any] = {name: getattr(config, name) for name in _PLAIN_FIELDS}
    hf |= {name: value for name, value in _FIXED.items() if name not in ("mlp_bias", "rope_interleave")}
    hf |= {
        "architectures": [_ARCHITECTURES[model_type]],
        "ep_size": 1,
        "model_type": model_type,
        "pretraining_tp": 1,
        "rope_scaling": None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "seq_aux": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if fp8:
        hf["quantization_config"] = QUANTIZATION_CONFIG
    return dict(sorted(hf.items()))


def _departures(config: ModelConfig, model_type: str) -> list[str]:
    """What `config` says that transformers 5 does not read, or reads otherwise, in a model of this type."""
    departures = []
    routing = _FAMILY_ROUTING[model_type]
    if config.scoring_func != routing["scoring_func"]:
        departures.append(
            f"it routes by {config.topk_method} on {config.scoring_func} scores, where scoring_func may be ignored "
            f"and {routing['scoring_func']} scores taken (model_type {model_type})"
        )
    if config.norm_topk_prob and model_type == "deepseek_v2":
        departures.append("norm_topk_prob is true, which may be ignored (model_type deepseek_v2)")
    if config.moe_layer_freq != 1:
        departures.append(f"moe_layer_freq is {config.moe_layer_freq}, which may be ignored")
    if config.rms_norm_eps != 1e-6:
        departures.append(f"rms_norm_eps is {config.rms_norm_eps}, and the norms of the latents may stay at 1e-06")
    scaling = config.rope_scaling
    # With either of the two at 0, transformers takes both for left out; the official code multiplies by what they say.
    if scaling and 0 in (scaling.mscale, scaling.mscale_all_dim) and scaling.mscale != 1 and scaling.factor > 1:
        departures.append(
            f"rope_scaling has mscale {scaling.mscale} and mscale_all_dim {scaling.mscale_all_dim}, and 0 may be taken "
            "for left out"
        )
    return departures


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` that a config.json means.

    Raises `UserError` on a missing, unknown, unsupported or contradictory field, by name. Warns of `aux_loss_alpha`
    0.001 and `initializer_range` 0.02, which the release carries though it was trained with 1e-4 and 0.006.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILY_ROUTING:
        raise UserError(f"config field 'model_type' is {model_type!r}, expected {_one_of(_FAMILY_ROUTING)}")
    for name, only in _FIXED.items():
        if hf.get(name, only) != only:
            raise UserError(f"config field '{name}' is {hf[name]!r}, but dsv3 supports {only!r} only")
    _check_quantization(hf.get("quantization_config"))
    known = {*_PLAIN_FIELDS, *_FIXED, *_IGNORED, "model_type", "quantization_config"}
    known |= {"rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim"}
    if unknown := sorted(set(hf) - known):
        raise UserError(f"unknown config fields {', '.join(unknown)}: remove them if they do not change the model")

    given = {name: _NULL.get(name) if hf[name] is None else hf[name] for name in _PLAIN_FIELDS if name in hf}
    values = _ABSENT | _FAMILY_ROUTING[model_type] | given
    if values.get("num_key_value_heads") is None and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if missing := sorted(set(_PLAIN_FIELDS) - set(values)):
        raise UserError(
            f"config fields {', '.join(missing)} are missing: is this a config.json of a DeepSeek-V3 model?"
        )
    for name, field_type in _PLAIN_FIELDS.items():
        _check_type(name, values[name], field_type)
    rope_theta, rope_scaling = _read_rope(hf)
    config = ModelConfig(**values, rope_theta=rope_theta, rope_scaling=rope_scaling)
    for name, derived in (("head_dim", config.qk_rope_head_dim), ("qk_head_dim", config.qk_head_dim)):
        if hf.get(name, derived) != derived:
            raise UserError(f"config field '{name}' is {hf[name]!r}, but the other fields make it {derived}")
    _warn_of_leftovers(model_type, hf)
    return config


def save_config(path: Path, hf: Mapping[str, Any]) -> None:
    """Write `hf` as config.json into the folder `path`."""
    (path / CONFIG_FILE).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def load_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint folder or a config.json. Raises `UserError`, with the file's name."""
    file = path if (path := Path(path)).suffix == ".json" else path / CONFIG_FILE
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; expected a checkpoint folder with config.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(hf, dict):
        raise UserError(f"{file} holds a JSON {type(hf).__name__}, expected an object of config fields")
    try:
        return config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling from either schema; where both stand in one file they must agree."""
    thetas: dict[str, Any] = {"rope_theta": hf.get("rope_theta")}
    scalings: dict[str, RopeScaling | None] = {}
    for field in ("rope_scaling", "rope_parameters"):
        if (raw := hf.get(field)) is None:
            continue
        if not isinstance(raw, dict):
            raise UserError(f"config field '{field}' is {raw!r}, expected null or an object")
        raw = {name: value for name, value in raw.items() if value is not None}
        thetas[f"{field}.rope_theta"] = raw.pop("rope_theta", None)
        scalings[field] = _read_scaling(field, raw)
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    for name, theta in given.items():
        _check_type(name, theta, "float")
    if len(set(given.values())) > 1:
        raise UserError(f"config fields contradict each other: {', '.join(f'{n} {v}' for n, v in given.items())}")
    if len(set(scalings.values())) > 1:
        raise UserError("config fields 'rope_scaling' and 'rope_parameters' contradict each other: keep one")
    return next(iter(given.values()), ModelConfig.rope_theta), next(iter(scalings.values()), None)


def _read_scaling(field: str, raw: dict[str, Any]) -> RopeScaling | None:
    kinds = {str(raw.pop(name)) for name in ("type", "rope_type") if name in raw} or {"default"}
    if len(kinds) > 1 or not kinds <= {"yarn", "default"}:
        raise UserError(f"config field '{field}' has type {_one_of(sorted(kinds))}, expected 'yarn' or 'default'")
    allowed = _ROPE_FIELDS if kinds == {"yarn"} else set()
    if unknown := sorted(set(raw) - allowed):
        raise UserError(f"config field '{field}' of type {_one_of(kinds)} has unknown keys {', '.join(unknown)}")
    if kinds == {"default"}:
        return None
    if missing := {"factor", "original_max_position_embeddings"} - set(raw):
        raise UserError(f"config field '{field}' of type 'yarn' lacks {', '.join(sorted(missing))}")
    for name, value in raw.items():
        _check_type(f"{field}.{name}", value, "float")
    # Left out, each for itself, they mean what they mean to the official modeling code. transformers agrees but for
    # a file that has mscale_all_dim alone, where it leaves that one out of the factor on cos and sin.
    return RopeScaling(**{"mscale": 1.0, "mscale_all_dim": 0.0} | raw)


def _check_quantization(raw: Any) -> None:
    if raw is None:
        return
    for name in ("quant_method", "fmt", "weight_block_size"):
        expected = QUANTIZATION_CONFIG[name]
        value = raw.get(name, expected if name == "fmt" else None) if isinstance(raw, dict) else None
        if value != expected:
            raise UserError(f"config field 'quantization_config.{name}' is {value!r}, but dsv3 reads {expected!r} only")


def _check_type(name: str, value: Any, field_type: Any) -> None:
    """JSON gives anything, `ModelConfig` compares numbers. field_type: an annotation's text, as dataclasses keep it."""
    expected, ok = {
        "int": ("a whole number", type(value) is int),
        "int | None": ("a whole number or null", value is None or type(value) is int),
        "float": ("a number", type(value) in (int, float)),
        "bool": ("true or false", type(value) is bool),
    }.get(field_type, ("a string", isinstance(value, str)))
    if not ok:
        raise UserError(f"config field '{name}' is {value!r}, expected {expected}")


def _warn_of_leftovers(model_type: str, hf: Mapping[str, Any]) -> None:
    if model_type != "deepseek_v3":
        return
    alpha, std = hf.get("aux_loss_alpha"), hf.get("initializer_range")
    leftovers = []
    if alpha == 0.001:
        leftovers.append("aux_loss_alpha 0.001 (trained with 1e-4)")
    # A file with another aux_loss_alpha was written by a trainer that sets both on purpose.
    if std == 0.02 and alpha in (None, 0.001):
        leftovers.append("initializer_range 0.02 (trained with 0.006)")
    if leftovers:
        warnings.warn(
            f"the config carries left-overs of the DeepSeek-V3 release: {', '.join(leftovers)}; "
            "set them before training from this config",
            stacklevel=4,
        )


def _one_of(names: Any) -> str:
    return " or ".join(repr(name) for name in names)
