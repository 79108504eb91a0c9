"""What the report on quantisation says, against sums by hand and on a model that has learned something."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.errors import UserError
from dsv3.ops.packed import can_pack
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight
from dsv3.serve.quantization_loss import compare, measure_quantization
from tests.serve.conftest import TEXTS
from tests.variants import BASE, random_model

TEXT = "".join(TEXTS)


def test_figures_are_the_sums_by_hand(text_model, tokenizer):
    """More text than a window of the model's length, so that there are several."""
    other = copy.deepcopy(text_model)
    with torch.no_grad():
        other.lm_head.weight *= 0.7
    tokens = torch.tensor([tokenizer.document_start_id, *tokenizer.encode(TEXT)])
    length = text_model.config.max_position_embeddings
    assert len(tokens) > 2 * length
    log_probs = []
    for model in (text_model, other):
        starts = range(0, len(tokens) - 1, length)
        parts = [model(tokens[None, s : min(s + length, len(tokens) - 1)]).logits[0] for s in starts]
        log_probs.append(torch.cat(parts).double().log_softmax(-1))
    p, q = log_probs
    loss = compare(text_model, other, tokenizer, TEXT)
    assert loss.tokens == len(tokens) - 1
    for found, bits, each in (
        (loss.perplexity, loss.bits_per_byte, p),
        (loss.quantized_perplexity, loss.quantized_bits_per_byte, q),
    ):
        nats = F.nll_loss(each, tokens[1:], reduction="sum").item()
        assert found == pytest.approx(math.exp(nats / loss.tokens), rel=1e-4)
        assert bits == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-4)
    kl = (p.exp() * (p - q)).sum(-1)
    assert loss.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert loss.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert loss.top1_agreement == 1  # a smaller head changes no order
    same = compare(text_model, text_model, tokenizer, TEXT)
    assert same.kl_max == 0 and same.perplexity == same.quantized_perplexity


def test_an_empty_text_is_refused(text_model, tokenizer):
    with pytest.raises(UserError, match="empty"):
        compare(text_model, text_model, tokenizer, "")


@pytest.mark.skipif(
    not can_pack(torch.empty(0, dtype=torch.bfloat16))
    or not all(kind.available() for kind in (Int8Weight, Int4Weight, Int8DynamicWeight)),
    reason="this CPU or this torch has no kernels for quantised weights",
)
def test_a_trained_model_loses_little_with_8_bits_and_more_with_4(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = BASE.replace(  # without experts: one token sent to another one weighs more than all roundings
        vocab_size=328,
        hidden_size=64,
        intermediate_size=64,
        q_lora_rank=64,
        v_head_dim=32,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
        first_k_dense_replace=2,
    )
    model = random_model(config, torch.Generator().manual_seed(0))
    tokens = torch.tensor([tokenizer.document_start_id, *tokenizer.encode(TEXT)])[: 128 * 4 + 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits = model(tokens[:-1].view(4, 128)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_pretrained(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    found = {
        name: measure_quantization(tmp_path / "model", name, TEXT) for name in ("none", "int8", "int8-dynamic", "int4")
    }
    assert found["none"].perplexity < 20  # of 328
    assert len({each.perplexity for each in found.values()}) == 1
    assert found["none"].kl_mean < found["int8"].kl_mean < found["int8-dynamic"].kl_mean < found["int4"].kl_mean
    for each in found.values():
        assert abs(math.log(each.quantized_perplexity / each.perplexity)) < 0.1 and each.top1_agreement > 0.9
