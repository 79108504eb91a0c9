"""Our engine, to be measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from protocol import Emit, Generate, Prompts, Setup, run

from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.pack import pack_weights
from dsv3.serve.params import SamplingParams


def load(setup: Setup) -> tuple[Generate, dict[str, Any]]:
    """The engine, on weights packed for this CPU; no drafts, no prefix caching."""
    torch.set_num_threads(setup.threads)
    model = load_pretrained(setup.model)
    pack_weights(model, "int8" if setup.weights == "int8" else "none")
    config = EngineConfig(
        cache_tokens=setup.sequences * (setup.length + 16),
        max_running=setup.sequences,
        max_prefill_tokens=setup.prefill,
        prefix_caching=False,
        draft_tokens=0,
    )
    engine = Engine(model, None, config)

    def generate(prompts: Prompts, new: int, emit: Emit) -> None:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        index = {engine.add(prompt, params): i for i, prompt in enumerate(prompts)}
        while engine.has_work():
            for output in engine.step():
                emit(index[output.request_id], [token.id for token in output.tokens])

    return generate, {"version": torch.__version__, "settings": asdict(config)}


if __name__ == "__main__":
    run(load)
