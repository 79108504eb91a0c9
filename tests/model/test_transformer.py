"""The whole model against the same model in loops; causality; decoding from the cache against the full forward."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.cache import LatentCache
from dsv3.model.transformer import Transformer
from tests import reference
from tests.variants import BASE, VARIANTS, random_model, random_tokens

each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_the_model_is_the_reference(config, generator):
    model = random_model(config, generator, torch.float64)
    tokens = random_tokens(config, (2, 7), generator)
    said = model(tokens)
    expected = [reference.say(config, reference.weights_of(model), row) for row in tokens.tolist()]
    close = {"atol": 1e-5, "rtol": 1e-5}  # the tables of cos and sin are FP32
    torch.testing.assert_close(said.logits, torch.stack([torch.stack(e.logits) for e in expected]), **close)
    assert len(said.mtp_logits) == config.num_nextn_predict_layers
    for k, logits in enumerate(said.mtp_logits):
        torch.testing.assert_close(logits, torch.stack([torch.stack(e.mtp_logits[k]) for e in expected]), **close)
    assert said.routings.keys() == expected[0].layers.keys()
    for name, routing in said.routings.items():
        layers = [e.layers[name] for e in expected]
        assert routing.expert_ids_TK.tolist() == [ids for layer in layers for ids in layer.chosen]
        weights = torch.tensor([w for layer in layers for w in layer.weights], dtype=torch.float64)
        torch.testing.assert_close(routing.weights_TK, weights, **close)
        torch.testing.assert_close(
            routing.scores_TE, torch.stack([s for layer in layers for s in layer.scores]), **close
        )
        counts = [layer.counts(config.n_routed_experts) for layer in layers]
        assert routing.counts_E.tolist() == [sum(both) for both in zip(*counts, strict=True)]


@each_variant
def test_a_later_token_changes_nothing_earlier_and_something_from_there_on(config, generator):
    model = random_model(config, generator, torch.float64)
    tokens = random_tokens(config, (1, 8), generator)
    before = model(tokens)
    for changed in range(tokens.shape[1]):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        after = model(other)
        # Depth k reads token i+k at position i (the main model is depth 0).
        for depth, (a, b) in enumerate(
            zip((before.logits, *before.mtp_logits), (after.logits, *after.mtp_logits), strict=True)
        ):
            first = max(changed - depth, 0)
            torch.testing.assert_close(b[:, :first], a[:, :first], atol=1e-10, rtol=0)
            moved = (b - a).abs().amax(-1)[0]
            assert (moved[first:] > 1e-6).all(), (changed, depth)


@each_variant
def test_rows_of_a_batch_know_nothing_of_each_other(config, generator):
    model = random_model(config, generator, torch.float64)
    tokens = random_tokens(config, (3, 6), generator)
    together = model(tokens)
    for row in range(3):
        alone = model(tokens[row : row + 1])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-10, rtol=0)
        for a, b in zip(together.mtp_logits, alone.mtp_logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-10, rtol=0)


S = 12
splits = st.sets(st.integers(1, S - 1)).map(lambda cuts: list(zip([0, *sorted(cuts)], [*sorted(cuts), S], strict=True)))


@each_variant
@pytest.mark.parametrize("order", ["cheaper", "expanded", "absorbed"])
def test_decoding_from_the_cache_in_any_split_is_the_full_forward(config, order, generator, monkeypatch):
    model = random_model(config, generator)
    tokens = random_tokens(config, (2, S), generator)
    with torch.no_grad():
        full = model.hidden_states(tokens)
    if order != "cheaper":
        monkeypatch.setattr("dsv3.model.mla.absorbing_pays", lambda *_: order == "absorbed")

    @settings(max_examples=12)
    @given(splits)
    @torch.no_grad()
    def check(split):
        cache = LatentCache(config, 2, S, dtype=torch.float32)
        main = torch.cat([model.extend(tokens[:, a:b], cache) for a, b in split], dim=1)
        torch.testing.assert_close(main, full.main_BSD, atol=1e-5, rtol=1e-5)
        previous = full.main_BSD
        for depth, expected in enumerate(full.mtp, start=1):
            last = S - depth
            parts = [
                model.extend_mtp(depth, previous[:, a : min(b, last)], tokens[:, a + depth : b + depth], cache)
                for a, b in split
                if a < last
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
            previous = expected

    check()


def test_documents_under_a_mask_do_not_see_each_other(generator):
    config = VARIANTS["yarn, no shared experts, D=3"]
    model = random_model(config, generator, torch.float64)
    tokens = random_tokens(config, (2, 11), generator)
    lengths = [4, 1, 6]
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] == document).tril()[None, None]
    packed = model.hidden_states(tokens, mask=mask)
    start = 0
    for length in lengths:
        alone = model.hidden_states(tokens[:, start : start + length])
        # Positions are relative: where a document begins does not matter.
        packed_main = packed.main_BSD[:, start : start + length]
        torch.testing.assert_close(packed_main, alone.main_BSD, atol=1e-5, rtol=1e-5)
        for k, expected in enumerate(alone.mtp, start=1):
            here = packed.mtp[k - 1][:, start : start + max(length - k, 0)]
            torch.testing.assert_close(here, expected, atol=1e-5, rtol=1e-5)
        start += length


def padded(model: Transformer, tokens: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Counts by layer of a batch whose rows are padded at the right."""
    valid = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return {name: r.counts_E for name, r in model.hidden_states(tokens, valid_BS=valid).routings.items()}


def unpadded(model: Transformer, tokens: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """The same, each row by itself and cut to its length."""
    total: dict[str, torch.Tensor] = {}
    for row, length in enumerate(lengths):
        for name, routing in model.hidden_states(tokens[row : row + 1, :length]).routings.items():
            total[name] = total.get(name, 0) + routing.counts_E
    return total


def test_padding_is_not_counted(generator):
    config = BASE.replace(num_nextn_predict_layers=0)
    model = random_model(config, generator, torch.float64)
    tokens, lengths = random_tokens(config, (3, 9), generator), [9, 4, 1]
    counts = padded(model, tokens, lengths)
    expected = unpadded(model, tokens, lengths)
    assert counts.keys() == expected.keys() and counts
    for name in counts:
        assert counts[name].tolist() == expected[name].tolist()
        assert counts[name].sum() == sum(lengths) * config.num_experts_per_tok


def test_mtp_counts_no_position_that_reads_padding(generator):
    config = BASE.replace(num_nextn_predict_layers=2)
    model = random_model(config, generator, torch.float64)
    tokens, lengths = random_tokens(config, (3, 9), generator), [9, 4, 1]
    counts = padded(model, tokens, lengths)
    expected = unpadded(model, tokens, lengths)
    for name in counts:
        assert counts[name].tolist() == expected[name].tolist(), name


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_sequence_may_be_too_short_for_a_depth(length, generator):
    config = BASE.replace(num_nextn_predict_layers=3)
    said = random_model(config, generator)(random_tokens(config, (2, length), generator))
    assert said.logits.shape == (2, length, config.vocab_size)
    assert [logits.shape for logits in said.mtp_logits] == [(2, max(length - k, 0), 48) for k in (1, 2, 3)]
    assert set(said.routings) == {"layers.1", *(f"mtp.{k - 1}" for k in (1, 2, 3) if k < length)}


@each_variant
def test_recomputation_changes_no_gradient_and_in_full_runs_every_block_twice(config, generator):
    model = random_model(config, generator, torch.float64)
    tokens = random_tokens(config, (2, 7), generator)
    direction = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, generator=generator)
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    for module in (*model.layers, *model.mtp):
        getattr(module, "block", module).self_attn.register_forward_hook(count)
    blocks, gradients, values = config.num_layers_with_mtp, [], []
    for recompute in ("none", "selective", "full"):
        model.recompute, runs = recompute, 0
        model.zero_grad()
        hidden = model.hidden_states(tokens, aux_loss_scale=0.1)
        loss = sum((h * direction[:, : h.shape[1]]).sum() for h in (hidden.main_BSD, *hidden.mtp))
        loss.backward()
        assert runs == blocks * (2 if recompute == "full" else 1)
        values.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert values[0] == values[1] == values[2]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-14, rtol=1e-12)
    with torch.no_grad():
        runs = 0
        model(tokens)
        assert runs == blocks  # nothing to recompute for


def test_weights_begin_normal_norms_at_one_and_biases_at_zero(seed):
    torch.manual_seed(seed)
    config = BASE.replace(hidden_size=128, initializer_range=0.03)
    model = Transformer(config)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif "bias" in name:
            assert (tensor == 0).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.03, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.03 * 5 / tensor.numel() ** 0.5, name
    first = model.lm_head.weight.clone()
    model.init_weights()
    assert not torch.equal(model.lm_head.weight, first)


def test_more_tokens_than_positions_is_an_error(generator):
    config = BASE.replace(max_position_embeddings=8)
    model = random_model(config, generator)
    assert model(random_tokens(config, (1, 8), generator)).logits.shape[1] == 8
    with pytest.raises(UserError, match="9 tokens are more than max_position_embeddings \\(8\\)"):
        model(random_tokens(config, (1, 9), generator))
    cache = LatentCache(config, 1, 20, dtype=torch.float32)
    model.extend(random_tokens(config, (1, 6), generator), cache)
    with pytest.raises(UserError, match="9 tokens are more than max_position_embeddings \\(8\\)"):
        model.extend(random_tokens(config, (1, 3), generator), cache)


def test_bfloat16_is_near_float64(generator):
    config = ModelConfig.preset("micro").replace(rope_scaling=VARIANTS["yarn, no shared experts, D=3"].rope_scaling)
    model = random_model(config, generator)
    tokens = random_tokens(config, (2, 16), generator)
    with torch.no_grad():
        exact = model.double()(tokens)
        rounded = model.bfloat16()(tokens)
    assert rounded.logits.dtype == torch.bfloat16
    # A token whose experts were a near tie may be sent elsewhere; the typical one must not notice the rounding.
    error = (rounded.logits.double() - exact.logits).abs().amax(-1) / exact.logits.std()
    assert error.median() < 0.1
