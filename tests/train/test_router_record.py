"""A step's routing as a file: what the model did, in the order of the step, the same under any layout."""

import dataclasses

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.parallel.ranks import Ranks
from dsv3.train.config import TrainConfig
from dsv3.train.router_record import RouterRecorder, read_router_record, router_records
from dsv3.train.timetable import Step
from tests.variants import VARIANTS, random_model, random_tokens

PLAN = Step(7, 0, 5, 0, 0.0, 0.3, 0.0)


def recorded(model: Transformer, tokens_BS1: torch.Tensor, run, *, mtp_weight: float = 0.3, micro_batch_size: int = 2):
    """The record of a step in micro-batches."""
    plan = dataclasses.replace(PLAN, mtp_weight=mtp_weight)
    config = TrainConfig(out=run, micro_batch_size=micro_batch_size)
    recorder = RouterRecorder(model.config, config, plan, tokens_BS1, first=0)
    for number, part_BS in enumerate(tokens_BS1[:, :-1].split(micro_batch_size)):
        recorder.observe(model.hidden_states(part_BS, mtp=mtp_weight > 0).routings, number)
    return read_router_record(recorder.save(run, plan.number, Ranks()))


@pytest.mark.parametrize("name", ["v3", "every second layer MoE, D=2", "V2's router, no MTP"])
@pytest.mark.parametrize("mtp_weight", [0.3, 0.0])
def test_it_is_what_the_model_routes(name, mtp_weight, generator, tmp_path):
    model = random_model(VARIANTS[name], generator, torch.float64)
    tokens_BS1 = random_tokens(model.config, (5, 9), generator)
    record = recorded(model, tokens_BS1, tmp_path, mtp_weight=mtp_weight)
    whole = model.hidden_states(tokens_BS1[:, :-1], mtp=mtp_weight > 0).routings
    assert record.step == 7 and torch.equal(record.tokens_BS, tokens_BS1[:, :-1].int())
    assert list(record.expert_ids) == list(record.weights) == list(whole)
    for layer, routing in whole.items():
        assert torch.equal(record.expert_ids[layer].flatten(0, 1).long(), routing.expert_ids_TK)
        torch.testing.assert_close(record.weights[layer].flatten(0, 1), routing.weights_TK.detach().float())
    assert router_records(tmp_path) == [tmp_path / "router" / "step-00000007.safetensors"]


def test_padding_and_processes_without_sequences_write_nothing(generator, tmp_path):
    model = random_model(VARIANTS["v3"], generator)
    tokens_BS1 = random_tokens(model.config, (5, 9), generator)
    expected = recorded(model, tokens_BS1, tmp_path)
    config = TrainConfig(out=tmp_path, micro_batch_size=2)
    recorder = RouterRecorder(model.config, config, PLAN, tokens_BS1[:0], first=5)
    recorder.observe(model.hidden_states(tokens_BS1[:1, :-1]).routings, 0)
    empty = read_router_record(recorder.save(tmp_path / "other", 7, Ranks()))
    assert empty.tokens_BS.shape == expected.tokens_BS.shape and not empty.tokens_BS.any()
    assert not any(ids.any() for ids in empty.expert_ids.values())


def test_what_is_no_record_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    for path in (tmp_path / "x.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="is no router record"):
            read_router_record(path)
    with pytest.raises(UserError, match="'router_every' is -1"):
        TrainConfig(router_every=-1)
