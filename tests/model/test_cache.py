"""The latent cache: what is appended comes back, what was not written is poison."""

from __future__ import annotations

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.cache import LatentCache
from tests.variants import BASE


def held(cache: LatentCache, layer: int, new: torch.Tensor) -> torch.Tensor:
    """What the cache holds once `new` has been appended: one causal piece."""
    (piece,) = cache.append(layer, new)
    assert piece.num_queries == new.shape[1] and piece.mask is None
    return piece.latents.side_by_side()


def test_layers_have_lengths_of_their_own_and_keep_what_they_were_given(generator):
    config = BASE.replace(num_nextn_predict_layers=2)
    cache = LatentCache(config, 3, 10, dtype=torch.float64)
    written = {layer: torch.empty(3, 0, config.latent_dim, dtype=torch.float64) for layer in range(4)}
    for layer, length in [(0, 4), (1, 1), (0, 1), (3, 7), (1, 3), (0, 5)]:
        new = torch.randn(3, length, config.latent_dim, dtype=torch.float64, generator=generator)
        written[layer] = torch.cat((written[layer], new), dim=1)
        assert torch.equal(held(cache, layer, new), written[layer])
        assert [cache.length(layer) for layer in range(4)] == [w.shape[1] for w in written.values()]
    nothing = torch.empty(3, 0, config.latent_dim, dtype=torch.float64)
    for layer in range(4):
        assert torch.equal(held(cache, layer, nothing), written[layer])


def test_truncated_tokens_are_overwritten(generator):
    cache = LatentCache(BASE, 1, 6, dtype=torch.float32)
    first, second = torch.randn(2, 1, 4, BASE.latent_dim, generator=generator)
    cache.append(0, first)
    cache.truncate(0, 2)
    assert cache.length(0) == 2
    assert torch.equal(held(cache, 0, second), torch.cat((first[:, :2], second), dim=1))


@pytest.mark.parametrize("length", [-1, 5])
def test_truncating_can_only_shorten(length):
    cache = LatentCache(BASE, 1, 6, dtype=torch.float32)
    cache.append(0, torch.zeros(1, 4, BASE.latent_dim))
    with pytest.raises(ValueError, match=f"layer 0 holds 4 tokens, cannot be cut to {length}"):
        cache.truncate(0, length)


def test_a_full_cache_is_an_error_that_changes_nothing():
    cache = LatentCache(BASE, 1, 6, dtype=torch.float32)
    cache.append(1, torch.ones(1, 5, BASE.latent_dim))
    with pytest.raises(UserError, match="holds 6 tokens, 7 are needed"):
        cache.append(1, torch.zeros(1, 2, BASE.latent_dim))
    assert cache.length(1) == 5
    assert (held(cache, 1, torch.ones(1, 1, BASE.latent_dim)) == 1).all()


def test_unwritten_slots_are_nan():
    cache = LatentCache(BASE, 2, 6, dtype=torch.bfloat16)
    cache.append(0, torch.zeros(2, 3, BASE.latent_dim, dtype=torch.bfloat16))
    assert cache._data[0, :, 3:].isnan().all() and cache._data[1:].isnan().all()
    assert not cache._data[0, :, :3].isnan().any()


def test_v3_needs_70272_bytes_per_token_in_bfloat16():
    config = ModelConfig.preset("v3-671b").replace(num_nextn_predict_layers=0)
    assert LatentCache(config, 1, 1000, dtype=torch.bfloat16, device="meta").nbytes == 70272 * 1000
    with_mtp = LatentCache(config.replace(num_nextn_predict_layers=1), 2, 10, dtype=torch.bfloat16, device="meta")
    assert with_mtp.nbytes == 62 * 2 * 10 * 576 * 2
