"""The five stages: their plain composition is the block, and two micro-batches may take turns through them."""

from __future__ import annotations

import pytest
import torch

from dsv3.model.context import Context
from dsv3.model.experts import LocalDispatcher
from dsv3.model.rope import cos_sin, inverse_frequencies
from tests import reference
from tests.variants import VARIANTS, random_model


def context(config, length):
    cos, sin = cos_sin(config, inverse_frequencies(config), torch.arange(length).unsqueeze(0))
    return Context(cos=cos, sin=sin)


NAMES = ["v3", "no query latent, 2 shared experts, D=2", "yarn, no shared experts, D=3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "MoE"])
def test_a_block_is_the_reference(name, layer, generator):
    config = VARIANTS[name]
    block = random_model(config, generator, torch.float64).layers[layer]
    h = torch.randn(2, 5, config.hidden_size, dtype=torch.float64, generator=generator)
    out, routing = block(h, context(config, 5))
    for row in range(2):
        expected, seen = reference.block(config, reference.weights_of(block), "", layer, list(h[row]))
        torch.testing.assert_close(out[row], torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert (seen is None) == (routing is None) == (layer == 0)
        if seen is not None:
            assert routing.expert_ids_TK.view(2, 5, -1)[row].tolist() == seen.chosen


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "MoE"])
def test_two_micro_batches_take_turns_through_the_stages(layer, generator):
    config = VARIANTS["v3"]
    block = random_model(config, generator, torch.float64).layers[layer]
    h = torch.randn(2, 3, 5, config.hidden_size, dtype=torch.float64, generator=generator)
    shared = context(config, 5)
    attended = [block.attend_and_route(x, shared) for x in h]
    dispatched = [block.dispatch(a) for a in attended]
    ran = [block.run_experts(a, d) for a, d in zip(attended, dispatched, strict=True)]
    combined = [block.combine(rows, d) for (rows, _), d in zip(ran, dispatched, strict=True)]
    for i in (1, 0):
        out = block.aggregate(attended[i], ran[i][1], combined[i])
        expected, routing = block(h[i], shared)
        assert torch.equal(out, expected)
        if layer == 0:
            assert dispatched[i] is combined[i] is ran[i][0] is routing is None


def test_the_dispatcher_can_be_replaced_from_outside(generator):
    config = VARIANTS["v3"]
    block = random_model(config, generator, torch.float64).layers[1]
    h = torch.randn(2, 5, config.hidden_size, dtype=torch.float64, generator=generator)
    expected, _ = block(h, context(config, 5))

    seen = []

    class Watched(LocalDispatcher):
        def dispatch(self, x_TD, routing):
            seen.append(("dispatch", tuple(x_TD.shape)))
            return super().dispatch(x_TD, routing)

        def combine(self, rows_ND, dispatched):
            seen.append(("combine", tuple(rows_ND.shape)))
            return super().combine(rows_ND, dispatched)

    block.mlp.dispatcher = Watched()
    out, _ = block(h, context(config, 5))
    assert torch.equal(out, expected)
    D = config.hidden_size
    assert seen == [("dispatch", (10, D)), ("combine", (10 * config.num_experts_per_tok, D))]
