"""A config that makes no sense is refused, with a sentence that names the field."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3.config import PRESETS, ModelConfig, RopeScaling
from dsv3.errors import UserError
from tests.variants import BASE, YARN

POSITIVE = (
    "vocab_size hidden_size num_hidden_layers moe_layer_freq intermediate_size moe_intermediate_size "
    "n_routed_experts num_experts_per_tok n_group topk_group num_attention_heads q_lora_rank kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim rms_norm_eps rope_theta routed_scaling_factor "
    "max_position_embeddings initializer_range"
).split()
NOT_NEGATIVE = "first_k_dense_replace n_shared_experts num_nextn_predict_layers aux_loss_alpha".split()

OUT_OF_RANGE = [
    *[(name, bad) for name in POSITIVE for bad in (0, -1)],
    *[(name, -1) for name in NOT_NEGATIVE],
    ("num_key_value_heads", 1),
    ("num_key_value_heads", 0),
    ("qk_rope_head_dim", 7),
    ("scoring_func", "tanh"),
    ("topk_method", "random"),
    ("n_group", 3),  # no divisor of 8
    ("n_group", 8),  # groups of one expert have no best two
    ("topk_group", 5),
    ("num_experts_per_tok", 5),  # two groups of two hold only four
    ("bos_token_id", -1),
    ("bos_token_id", 48),
    ("eos_token_id", -1),
    ("eos_token_id", 48),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"'{field}' is {value!r}, expected "):
        BASE.replace(**{field: value})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
@pytest.mark.parametrize("value", ["12", [2], {}, float("nan")], ids=str)
def test_a_value_of_another_type_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"'{field}' is "):
        BASE.replace(**{field: value})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig) if str(f.type).startswith("int")])
@pytest.mark.parametrize("value", [2.0, 2.5, True])
def test_a_number_that_is_not_whole_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"'{field}' is {value}, expected a whole number"):
        BASE.replace(**{field: value})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig) if f.type == "float"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), True])
def test_a_number_that_is_not_finite_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"'{field}' is {value}, expected a finite number"):
        BASE.replace(**{field: value})


def test_every_field_has_a_value_that_is_refused():
    refused = {field for field, _ in OUT_OF_RANGE}
    # A bool has no range; rope_scaling checks itself (below).
    assert refused == {field.name for field in dataclasses.fields(ModelConfig)} - {"norm_topk_prob", "rope_scaling"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "linear"),
        ("factor", 0.5),
        ("factor", float("nan")),
        ("original_max_position_embeddings", 0),
        ("beta_fast", 0.05),  # not above beta_slow
        ("beta_fast", 0.1),
        ("beta_fast", float("nan")),
        ("mscale", float("inf")),
        ("mscale_all_dim", "1"),
        ("beta_slow", True),
    ],
)
def test_rope_scaling_is_checked(field, value):
    with pytest.raises(UserError, match=rf"'rope_scaling\.{field}' is {value!r}, expected "):
        dataclasses.replace(YARN, **{field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 4},  # all the experts of two groups of two
        {"num_experts_per_tok": 8, "topk_method": "greedy"},  # reaches every expert
        {"n_group": 8, "topk_method": "group_limited_greedy"},  # a group of one is its own best expert
        {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
        {"q_lora_rank": None, "bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": 47, "eos_token_id": 0},
        {"n_shared_experts": 0, "num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "aux_loss_alpha": 0},
        {"first_k_dense_replace": 100},
        {"rope_scaling": RopeScaling(1, 64)},
    ],
)
def test_the_edges_of_the_ranges_are_allowed(changes):
    config = BASE.replace(**changes)
    assert all(getattr(config, name) == value for name, value in changes.items())


def test_replace_changes_a_copy():
    config = BASE.replace(hidden_size=40, vocab_size=50)
    assert (config.hidden_size, config.vocab_size) == (40, 50) and BASE.hidden_size == 32
    assert dataclasses.replace(config, hidden_size=32, vocab_size=48) == BASE
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 7


def test_an_unknown_field_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no field 'n_layers'; it has .*num_hidden_layers"):
        BASE.replace(n_layers=3)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no preset 'v4'; choose one of nano, .*v3-671b"):
        ModelConfig.preset("v4")
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_are_called(name):
    config = ModelConfig.preset(name)
    assert config is PRESETS[name] and config == config.replace()
    layers = range(config.num_layers_with_mtp)
    assert not config.is_moe_layer(0) and config.is_moe_layer(layers[-1])


def test_the_released_model():
    config = ModelConfig.preset("v3-671b")
    assert (config.qk_head_dim, config.latent_dim, config.num_layers_with_mtp) == (192, 576, 62)
    assert [config.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert (config.aux_loss_alpha, config.initializer_range) == (1e-4, 0.006)  # trained with, not released
    yarn = config.rope_scaling
    assert (yarn.factor * yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (163840, 32, 1)


def test_every_second_layer():
    config = BASE.replace(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2, num_nextn_predict_layers=2)
    assert [config.is_moe_layer(layer) for layer in range(8)] == [False, False, True, False, True, False, True, False]
