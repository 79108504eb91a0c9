"""Document masks, and what they are for: a model that cannot see beyond a document's end."""

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.data.documents import document_ids, document_mask
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE
from dsv3.train.step import labels_at

BOS, EOS = 0, 1


@pytest.fixture
def tokens_BS(generator) -> torch.Tensor:
    """Documents of all lengths, some of them empty; the second row has none that ends."""
    tokens = torch.randint(2, 300, (4, 40), generator=generator)
    ends = torch.rand(tokens.shape, generator=generator) < 0.15
    ends[1] = False
    ends[0, 5] = ends[0, 6] = ends[2, 0] = ends[3, -1] = True
    return tokens.masked_fill(ends, EOS)


def test_documents_are_numbered_and_an_end_belongs_to_what_it_ends():
    tokens = torch.tensor([[7, 8, EOS, 9, EOS, EOS, 7], [EOS, 7, 7, 7, 7, 7, EOS]])
    assert document_ids(tokens, EOS).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("start_id", [BOS, EOS])
def test_a_query_looks_back_to_the_token_that_begins_its_document(start_id, tokens_BS):
    """With BOS in front of documents, it sees that, and not the end of the one before."""
    if start_id == BOS:
        behind_an_end = torch.nn.functional.pad(tokens_BS[:, :-1] == EOS, (1, 0), value=True)
        tokens_BS = tokens_BS.masked_fill(behind_an_end, BOS)
    mask = document_mask(tokens_BS, start_id)
    B, S = tokens_BS.shape
    assert mask.shape == (B, 1, S, S) and mask.dtype == torch.bool
    for b in range(B):
        start = 0
        for i in range(S):
            start = i if tokens_BS[b, i] == start_id else start
            assert mask[b, 0, i].nonzero().flatten().tolist() == list(range(start, i + 1))


@pytest.mark.parametrize("depths", [1, 2])
def test_what_one_document_says_changes_nothing_in_another(tokens_BS, generator, seed, depths):
    """At every position that has a target of its own document; the others serve those behind them at most."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.preset("micro").replace(num_nextn_predict_layers=depths)).double().eval()
    document_BS = document_ids(tokens_BS, EOS)
    changed_BS = tokens_BS.clone()
    chosen = (document_BS == document_BS[:, 20:21]) & (tokens_BS != EOS)
    changed_BS[chosen] = torch.randint(2, 300, (int(chosen.sum()),), generator=generator)
    assert (changed_BS != tokens_BS).any(1).sum() >= 2

    mask = document_mask(tokens_BS, EOS)
    with torch.no_grad():
        before, after = (model.hidden_states(tokens, mask=mask) for tokens in (tokens_BS, changed_BS))
        unmasked = model.hidden_states(changed_BS).main_BSD
    other_BS = document_BS != document_BS[:, 20:21]
    other_BS &= tokens_BS != EOS
    torch.testing.assert_close(after.main_BSD[other_BS], before.main_BSD[other_BS], rtol=0, atol=1e-12)
    assert not torch.allclose(unmasked[other_BS], before.main_BSD[other_BS]), "the mask does nothing"
    assert not torch.allclose(after.main_BSD[chosen], before.main_BSD[chosen]), "the change does nothing"
    for k in range(1, depths + 1):
        # tokens_BS as input has one position less per depth with a target inside the document
        has_target = labels_at(tokens_BS, k - 1, EOS)[:, : tokens_BS.shape[1] - k] != IGNORE
        mine = other_BS[:, : tokens_BS.shape[1] - k] & has_target
        assert mine.any()
        torch.testing.assert_close(after.mtp[k - 1][mine], before.mtp[k - 1][mine], rtol=0, atol=1e-12)


def test_a_document_in_a_pack_is_as_it_would_be_alone(tokens_BS, seed):
    """With the token in front of it, as generation puts it there.

    Positions are not counted anew, and need not be: RoPE makes scores depend on distances alone.
    """
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.preset("micro")).double().eval()
    mask = document_mask(tokens_BS, EOS)
    with torch.no_grad():
        packed = model.hidden_states(tokens_BS, mask=mask, mtp=False).main_BSD
        for b, document in ((0, 2), (2, 1), (1, 0)):
            own = (document_ids(tokens_BS, EOS)[b] == document).nonzero().flatten()
            front = own[:1] - 1 if own[0] > 0 else own[:0]
            own = torch.cat((front, own[tokens_BS[b, own] != EOS]))
            alone = model.hidden_states(tokens_BS[b : b + 1, own], mtp=False).main_BSD
            torch.testing.assert_close(packed[b : b + 1, own], alone, rtol=0, atol=1e-5)
