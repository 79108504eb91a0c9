"""The router: the worked cases of the goldens, the selection against loops, gradients, precision."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dsv3.config import ModelConfig
from dsv3.model.context import Context
from dsv3.model.router import Router, expert_weights, select_experts
from dsv3.model.transformer import Transformer
from tests import reference
from tests.variants import BASE, VARIANTS, random_model

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "gate_bias_yarn.json").read_text())["small_gate"]


def context(**changes) -> Context:
    return Context(**{"cos": torch.empty(0), "sin": torch.empty(0), **changes})


def random_router(config: ModelConfig, generator: torch.Generator, dtype=torch.float64) -> Router:
    router = Router(config)
    with torch.no_grad():
        router.weight.normal_(std=2 * config.hidden_size**-0.5, generator=generator)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)
    return router.to(dtype)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["logits"])
def test_goldens(case):
    config = BASE.replace(
        n_routed_experts=GOLDEN["experts"],
        n_group=GOLDEN["groups"],
        topk_group=GOLDEN["topk_group"],
        num_experts_per_tok=GOLDEN["top_k"],
        routed_scaling_factor=GOLDEN["routed_scaling_factor"],
    )
    factor, shift = map(int, re.fullmatch(r"\(\((\d+)i\+(\d+)\) mod 16\)/4 - 2", case["logits"]).groups())
    router = Router(config)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([(factor * i + shift) % 16 / 4 - 2 for i in range(16)])
        for expert, bias in GOLDEN["bias"].items():
            router.e_score_correction_bias[int(expert)] = bias
    x = torch.zeros(1, 1, config.hidden_size)
    x[..., 0] = 1
    routing = router(x, context())
    assert routing.expert_ids_TK.tolist() == [case["idx"]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([case["weights"]]), atol=1e-6, rtol=0)
    assert routing.counts_E.tolist() == [int(e in case["idx"]) for e in range(16)]


@st.composite
def routing_problems(draw):
    """A configuration, scores and biases in sixteenths: ties are frequent, and every sum is exact."""
    n_group, size = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    experts = n_group * size
    config = BASE.replace(
        n_routed_experts=experts,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=draw(st.integers(1, experts if method == "greedy" else topk_group * size)),
        topk_method=method,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    row = st.lists(st.integers(1, 15), min_size=experts, max_size=experts)
    scores = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float32) / 16
    biases = st.lists(st.integers(-96, 32), min_size=experts, max_size=experts)
    bias = draw(st.none() | biases)
    return config, scores, None if bias is None else torch.tensor(bias, dtype=torch.float32) / 16


@settings(max_examples=150)
@given(routing_problems())
def test_selection_is_the_reference(problem):
    config, scores_TE, bias_E = problem
    ids_TK, weights_TK = select_experts(scores_TE, bias_E, config)
    for scores_E, ids, weights in zip(scores_TE, ids_TK.tolist(), weights_TK, strict=True):
        assert ids == reference.route(scores_E.tolist(), None if bias_E is None else bias_E.tolist(), config)
        expected = torch.stack([torch.as_tensor(w) for w in reference.gates(scores_E, ids, config)])
        torch.testing.assert_close(weights, expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
def test_ties_go_to_the_lower_index(method):
    config = BASE.replace(n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=8, topk_method=method)
    ids_TK, _ = select_experts(torch.full((5, 64), 0.5), None, config)
    assert ids_TK.tolist() == [list(range(8))] * 5
    # Two levels: the later experts of every group are the better ones, and equal among themselves.
    scores = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.75, 0.75, 0.75, 0.75]).repeat(8).unsqueeze(0)
    ids_TK, _ = select_experts(scores, None, config)
    assert ids_TK.tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]]


def test_negative_biases_let_no_dropped_group_in(generator):
    config = BASE.replace(n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=4)
    scores_TE = torch.rand(50, 16, generator=generator)
    free, weights = select_experts(scores_TE, None, config)
    biased, biased_weights = select_experts(scores_TE, torch.full((16,), -8.0), config)
    assert torch.equal(biased, free) and torch.equal(biased_weights, weights)
    assert (biased // 4 == biased[:, :1] // 4).all()


@pytest.mark.parametrize("norm", [True, False])
def test_the_bias_is_never_in_the_weights(norm, generator):
    config = BASE.replace(norm_topk_prob=norm)
    scores_TE = torch.rand(40, config.n_routed_experts, generator=generator)
    bias_E = torch.randn(config.n_routed_experts, generator=generator)
    ids_TK, weights_TK = select_experts(scores_TE, bias_E, config)
    unbiased_TK, _ = select_experts(scores_TE, None, config)
    assert not torch.equal(ids_TK, unbiased_TK)  # the bias did select
    chosen = scores_TE.gather(1, ids_TK)
    expected = chosen / chosen.sum(1, keepdim=True) if norm else chosen
    torch.testing.assert_close(weights_TK, expected * config.routed_scaling_factor)
    torch.testing.assert_close(expert_weights(scores_TE, ids_TK, config), weights_TK, atol=0, rtol=0)


def test_scores_of_zero_give_weights_of_zero():
    weights = expert_weights(torch.zeros(1, 8), torch.tensor([[0, 1]]), BASE)
    assert weights.tolist() == [[0.0, 0.0]]


ROUTERS = {name: VARIANTS[name] for name in ("v3", "V2's router, no MTP", "greedy, small latent, wide values")}
each_router = pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS.keys())


@each_router
def test_scores_weights_and_gradients_are_the_references(config, generator):
    """With the sequence loss injected: the reference simply adds it to what is differentiated."""
    router = random_router(config, generator)
    B, S, scale = 2, 7, 0.3
    x = torch.randn(B, S, config.hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)
    direction = torch.randn(B * S, config.num_experts_per_tok, dtype=torch.float64, generator=generator)
    routing = router(x, context(aux_loss_scale=scale))
    (routing.weights_TK * direction).sum().backward()

    W = {f"router.{name}": tensor for name, tensor in reference.weights_of(router, grad=True).items()}
    other = x.detach().clone().requires_grad_()
    bias = W.get("router.e_score_correction_bias")
    total, losses, rows, raw = 0.0, [], [], []
    for b in range(B):
        scores = [reference.scores_of(config, W, "", x_D) for x_D in other[b]]
        losses.append(reference.sequence_loss(scores, config.num_experts_per_tok))
        for scores_E in scores:
            chosen = reference.route(scores_E.tolist(), None if bias is None else bias.tolist(), config)
            raw.append(reference.best(scores_E.tolist(), config.num_experts_per_tok))
            rows.append((chosen, reference.gates(scores_E, chosen, config), scores_E))
            total = total + sum(g * d for g, d in zip(rows[-1][1], direction[len(rows) - 1], strict=True))
    (total + scale * sum(losses)).backward()

    assert routing.expert_ids_TK.tolist() == [chosen for chosen, _, _ in rows]
    torch.testing.assert_close(routing.weights_TK, torch.stack([torch.stack(g) for _, g, _ in rows]))
    torch.testing.assert_close(routing.scores_TE, torch.stack([scores for _, _, scores in rows]))
    assert not routing.scores_TE.requires_grad
    torch.testing.assert_close(routing.balance_loss, sum(losses).detach() / B)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(router.weight.grad, W["router.weight"].grad)
    if config.topk_method != "greedy":  # the loss looked at other experts than were chosen: unbiased, ungrouped
        assert routing.expert_ids_TK.sort().values.tolist() != [sorted(ids) for ids in raw]


@each_router
def test_gradcheck(config, generator):
    router = random_router(config.replace(hidden_size=5), generator)
    x = torch.randn(1, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)

    def weights(x, weight):
        return torch.func.functional_call(router, {"weight": weight}, (x, context())).weights_TK

    assert torch.autograd.gradcheck(weights, (x, router.weight))


def test_without_the_loss_nothing_is_injected(generator):
    router = random_router(BASE, generator)
    x = torch.randn(1, 6, BASE.hidden_size, dtype=torch.float64, generator=generator)
    gradients = []
    for scale in (0.0, 0.5):
        routing = router(x, context(aux_loss_scale=scale))
        assert (routing.balance_loss is None) == (scale == 0)
        (gradient,) = torch.autograd.grad(routing.weights_TK.sum(), router.weight)
        gradients.append(gradient)
    assert gradients[0].abs().max() < 1e-12  # normalised weights always sum to the scale
    assert gradients[1].abs().max() > 1e-6


def test_only_valid_tokens_are_counted_but_all_are_routed(generator):
    router = random_router(BASE, generator)
    x = torch.randn(2, 5, BASE.hidden_size, dtype=torch.float64, generator=generator)
    valid = torch.tensor([[True, True, False, True, False], [False] * 4 + [True]])
    everything = router(x, context())
    routing = router(x, context(valid_BS=valid))
    assert torch.equal(routing.expert_ids_TK, everything.expert_ids_TK)
    expected = [0] * BASE.n_routed_experts
    for ids, counts in zip(everything.expert_ids_TK.tolist(), valid.flatten().tolist(), strict=True):
        for expert in ids if counts else ():
            expected[expert] += 1
    assert routing.counts_E.tolist() == expected
    assert everything.counts_E.sum() == 10 * BASE.num_experts_per_tok


NARROWER = {
    "bfloat16()": lambda module: module.bfloat16(),
    "half()": lambda module: module.half(),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "type(float16)": lambda module: module.type(torch.float16),
    "twice": lambda module: module.half().to(torch.bfloat16),
    "copied": lambda module: copy.deepcopy(module.bfloat16()),
    "float() again": lambda module: module.bfloat16().float().bfloat16(),
}


@pytest.mark.parametrize("narrow", NARROWER.values(), ids=NARROWER.keys())
def test_the_router_stays_in_float32(narrow, generator):
    model = random_model(BASE, generator)
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.copy_(5 + 0.001 * torch.arange(8))  # in BF16 these would all be 5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".router." in name}
    assert len(before) == 4  # weight and bias, of layers.1 and of mtp.0
    after = narrow(model).state_dict()
    for name, tensor in after.items():
        if name in before:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype in (torch.bfloat16, torch.float16), name


def test_the_router_stays_in_float32_on_the_meta_device_and_back():
    on_meta = Transformer(BASE).to("meta", torch.bfloat16)
    empty = copy.deepcopy(on_meta).to_empty(device="cpu")
    with torch.device("meta"):
        born_there = Transformer(BASE).bfloat16()
    for model, device in ((on_meta, "meta"), (empty, "cpu"), (born_there, "meta")):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
            assert tensor.device.type == device, name


def test_the_router_is_made_in_float32_whatever_the_default():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(BASE)
    finally:
        torch.set_default_dtype(default)
    assert model.lm_head.weight.dtype == torch.bfloat16
    router = model.layers[1].mlp.router
    assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32


def test_float64_is_no_loss_and_allowed():
    router = Transformer(BASE).double().layers[1].mlp.router
    assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float64
    assert router.float().weight.dtype == torch.float32


def test_half_precision_input_and_autocast_are_computed_in_float32(generator):
    router = random_router(BASE, generator, torch.float32)
    x = torch.randn(2, 6, BASE.hidden_size, generator=generator).bfloat16()
    expected = router(x.float(), context(aux_loss_scale=0.1))
    plain = router(x, context(aux_loss_scale=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(x, context(aux_loss_scale=0.1))
    for routing in (plain, under_autocast):
        assert routing.weights_TK.dtype == routing.scores_TE.dtype == torch.float32
        for name in ("expert_ids_TK", "weights_TK", "scores_TE", "counts_E", "balance_loss"):
            assert torch.equal(getattr(routing, name), getattr(expected, name)), name


def test_the_bias_is_saved_but_is_no_parameter(generator):
    model = random_model(BASE, generator)
    name = "layers.1.mlp.router.e_score_correction_bias"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
    other = random_model(BASE, generator)
    assert not torch.equal(other.get_buffer(name), model.get_buffer(name))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.get_buffer(name), model.get_buffer(name))
    without = Transformer(BASE.replace(topk_method="greedy"))
    assert name not in without.state_dict() and without.layers[1].mlp.router.e_score_correction_bias is None
