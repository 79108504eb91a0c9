"""Weights lent to a piece are the whole ones, and nothing of them stays; gradients come back summed, as rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dsv3.model.norm import RMSNorm
from dsv3.model.router import Router
from dsv3.parallel.lending import Lender
from dsv3.parallel.shard import shard_parameters
from tests.parallel.world import World, mesh_of
from tests.variants import BASE, random_model


def lent(*, seed: int, dtype: torch.dtype) -> None:
    """Every module's own weights, one after the other."""
    mesh, alone = mesh_of(dp_shard=2), random_model(BASE, torch.Generator().manual_seed(seed), torch.float32)
    model, lender = copy.deepcopy(alone), Lender()
    sharding = shard_parameters(model, mesh, dtype, lender.divide)
    expected, lent_whole = dict(alone.named_parameters()), list[Tensor]()
    for path, module in model.named_modules():
        for attribute, rows in list(module.named_parameters(recurse=False)):
            name = f"{path}.{attribute}"
            part = sharding.part(name, rows)
            assert (part.shards.size == 1) == isinstance(module, Router | RMSNorm), name
            if part.shards.size == 1:
                continue
            assert rows.dtype == torch.float32 and torch.equal(rows, expected[name][part.begin : part.end])
            for factor in (1.0, 10.0):  # two micro-batches, with another gradient on each rank
                with lender.lend([module]):
                    whole = getattr(module, attribute)
                    assert torch.equal(whole, expected[name].to(dtype)), name
                    ((mesh.rank + 1) * factor * whole).sum().backward()
                assert whole.untyped_storage().size() == 0 and whole.grad is None
                lent_whole.append(whole)
            assert getattr(module, attribute) is rows
            assert rows.grad.dtype == torch.float32 and torch.equal(rows.grad, torch.full_like(rows, 33.0)), name
    assert len(lent_whole) > 20 and not any(whole.untyped_storage().size() for whole in lent_whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_whole_while_they_are_lent(world2: World, seed: int, dtype: torch.dtype) -> None:
    world2.run(lent, seed=seed, dtype=dtype)


def lent_to_a_piece_that_fails(*, seed: int) -> None:
    mesh, model = mesh_of(dp_shard=2), random_model(BASE, torch.Generator().manual_seed(seed), torch.float32)
    lender = Lender()
    shard_parameters(model, mesh, torch.float32, lender.divide)
    rows = dict(model.named_parameters())
    with pytest.raises(KeyError), lender.lend([model.layers[0]]):
        whole = model.layers[0].self_attn.o_proj.weight
        assert whole is not rows["layers.0.self_attn.o_proj.weight"]
        raise KeyError
    assert whole.untyped_storage().size() == 0
    assert all(parameter is rows[name] and parameter.grad is None for name, parameter in model.named_parameters())


def test_a_piece_that_fails_leaves_rows(world2: World, seed: int) -> None:
    world2.run(lent_to_a_piece_that_fails, seed=seed)
