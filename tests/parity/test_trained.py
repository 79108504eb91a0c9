"""Trained by us, used by them: a run's checkpoint folder speaks the same in transformers as here."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dsv3.checkpoint.hf_config import config_to_hf
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.serve.generate import generate
from dsv3.train.config import TrainConfig
from dsv3.train.trainer import start_run
from tests.parity.twin import TheirMatches, Twin, assert_close, assert_same_speculation, load_theirs

NEW_TOKENS = 48


class Silence:
    """Shows no progress."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log(self, message: str) -> None: ...


@pytest.fixture(scope="module")
def phrases(request: pytest.FixtureRequest) -> list[str]:
    """What the training text is made of: few sentences, so that a few dozen steps teach something."""
    rng = random.Random(request.config.getoption("--seed"))
    words = ["".join(rng.choices("aeiounrstlmdkéß中文", k=rng.randint(2, 6))) for _ in range(30)]
    return [" ".join(rng.choices(words, k=7)) + rng.choice((".\n", ", ", "; ", "? 42\n")) for _ in range(6)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one MTP module", "two MTP modules"])
def checkpoint(request: pytest.FixtureRequest, phrases: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a short run of `micro`, with one or two MTP modules."""
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(request.config.getoption("--seed"))
    text = folder / "text"
    text.mkdir()
    for document in range(40):
        (text / f"{document}.txt").write_text("".join(rng.choices(phrases, k=30)), encoding="utf-8")
    config = ModelConfig.preset("micro").replace(num_nextn_predict_layers=request.param)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, dtype=torch.float32)))
    settings = TrainConfig(
        out=folder / "run",
        model=str(folder),
        data=str(text),
        tokens=str(80 * 16 * 48),
        batch_size="16",
        seq_len=48,
        eval_tokens=1000,
        seed=rng.randrange(2**31),
        device="cpu",
        dtype="float32",
    )
    trainer = start_run(settings, report=lambda message: None)
    trainer.fit(Silence())
    losses = [record["loss"] for record in trainer.run.records() if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]  # it did learn
    return trainer.run.checkpoints()[-1]


@pytest.fixture
def twin(checkpoint: Path) -> Twin:
    ours = load_pretrained(checkpoint)
    return Twin(ours, load_theirs(checkpoint, ours.config), checkpoint)


def test_tokenizer_and_greedy_tokens(checkpoint: Path, phrases: list[str]) -> None:
    # As a user loads it: no setting but the folder.
    theirs: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
    their_tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ours: Transformer = load_pretrained(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)
    for text in (*(phrase[: len(phrase) // 2] for phrase in phrases), "an unknown text 2024 和 😀"):
        ids = tokenizer.encode(text)
        inputs = their_tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        reply = generate(ours, ids, max_new_tokens=NEW_TOKENS, eos_token_id=ours.config.eos_token_id).tolist()
        their_reply = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        assert reply == their_reply
        assert tokenizer.decode(reply) == their_tokenizer.decode(their_reply, skip_special_tokens=True)


def test_logits(twin: Twin, phrases: list[str]) -> None:
    tokens = torch.tensor([Tokenizer.load(twin.folder).encode("".join(phrases))])
    with torch.no_grad():
        assert_close("logits", twin.ours(tokens).logits, twin.theirs(tokens).logits)
    biases = [router.e_score_correction_bias for name, router in twin.ours.named_modules() if name.endswith("router")]
    assert all(bias.abs().max() > 0 for bias in biases)  # balancing had moved what the routers choose by


def test_speculative_decoding(twin: Twin, phrases: list[str], their_matches: TheirMatches) -> None:
    tokenizer = Tokenizer.load(twin.folder)
    runs = [
        assert_same_speculation(
            twin,
            torch.tensor(tokenizer.encode(phrase[: len(phrase) // 2])),
            NEW_TOKENS,
            their_matches,
            eos_token_id=twin.config.eos_token_id,
        )
        for phrase in phrases[:4]
    ]
    accepted, drafted = sum(sum(run.accepted) for run in runs), sum(sum(run.drafted) for run in runs)
    assert accepted > 0.3 * drafted  # the modules have learned too, or little would be compared
