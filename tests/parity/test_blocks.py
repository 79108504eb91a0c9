"""Our blocks against those of transformers: each by itself on equal inputs, then all of them in a row.

One code serves DeepSeek-V3, Moonlight and DeepSeek-V2, so all three are here, against the model class that
transformers has for each.

Shapes: B batch, S tokens, T = B*S, D model, E routed experts, K chosen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model.context import Context
from dsv3.model.rope import cos_sin, inverse_frequencies
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from tests.parity.configs import CASES
from tests.parity.twin import assert_close, clear_tokens, make_twin, watch

cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def tokens_for(model: Transformer, generator: torch.Generator) -> Tensor:
    return clear_tokens(model, 2, 24 if model.config.rope_scaling is None else 80, generator)


def assert_same_routing(layer: int, ours: Routing, theirs: tuple[Tensor, Tensor, Tensor], config: ModelConfig) -> None:
    """Every expert's score; the chosen ones and their weights, in whatever order the K are listed."""
    logits_TE, weights_TK, ids_TK = theirs
    scores_TE = logits_TE.sigmoid() if config.scoring_func == "sigmoid" else logits_TE.softmax(-1)
    assert_close(f"scores {layer}", ours.scores_TE, scores_TE)
    our_ids_TK, our_order_TK = ours.expert_ids_TK.sort(dim=-1)
    their_ids_TK, their_order_TK = ids_TK.sort(dim=-1)
    assert torch.equal(our_ids_TK, their_ids_TK), f"router {layer} chose other experts"
    assert_close(f"weights {layer}", ours.weights_TK.gather(1, our_order_TK), weights_TK.gather(1, their_order_TK))


@cases
def test_each_block(config: ModelConfig, generator: torch.Generator, tmp_path: Path) -> None:
    twin = make_twin(config, tmp_path, generator)
    tokens_BS = tokens_for(twin.ours, generator)
    seen = watch(twin.theirs, tokens_BS)
    context = Context(*cos_sin(config, inverse_frequencies(config), torch.arange(tokens_BS.shape[1]).unsqueeze(0)))
    for i, block in enumerate(twin.ours.layers):
        at = f"model.layers.{i}"
        h_BSD = seen[f"{at}.input"]
        with torch.no_grad():
            for absorbed in (False, True):
                attention_BSD = block.self_attn(block.input_layernorm(h_BSD), context, absorbed)
                assert_close(f"attention {i}, absorbed {absorbed}", attention_BSD, seen[f"{at}.self_attn"][0])
            attended = block.attend_and_route(h_BSD, context)
            dispatched = block.dispatch(attended)
            rows_ND, local_BSD = block.run_experts(attended, dispatched)
            routed_TD = block.combine(rows_ND, dispatched)
            mlp_BSD = local_BSD if routed_TD is None else local_BSD + routed_TD.view_as(local_BSD)
            out_BSD = block.aggregate(attended, local_BSD, routed_TD)
        assert (attended.routing is not None) == (f"{at}.mlp.gate" in seen) == config.is_moe_layer(i)
        if attended.routing is not None:
            assert_same_routing(i, attended.routing, seen[f"{at}.mlp.gate"], config)
        assert_close(f"feed-forward {i}", mlp_BSD, seen[f"{at}.mlp"])
        assert_close(f"block {i}", out_BSD, seen[at])


@pytest.mark.parametrize("draw", range(2))  # each draw has a seed of its own
@cases
def test_end_to_end(config: ModelConfig, draw: int, generator: torch.Generator, tmp_path: Path) -> None:
    twin = make_twin(config, tmp_path, generator)
    tokens_BS = tokens_for(twin.ours, generator)
    ours, theirs = watch(twin.ours, tokens_BS), watch(twin.theirs, tokens_BS)
    for i in range(config.num_hidden_layers):
        hidden_BSD, routing = ours[f"layers.{i}"]
        if routing is not None:
            assert_same_routing(i, routing, theirs[f"model.layers.{i}.mlp.gate"], config)
        assert_close(f"hidden after layer {i}", hidden_BSD, theirs[f"model.layers.{i}"])
    assert_close("hidden after the norm", ours["norm"], theirs["model.norm"])
    assert_close("logits", ours["lm_head"], theirs["lm_head"])
    assert 0.3 < float(ours["lm_head"].std()) < 3  # or the tolerance would mean nothing
