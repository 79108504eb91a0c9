"""llama.cpp, to be measured: the server of its xllamacpp wheel, asked in this process, every request streaming."""

from __future__ import annotations

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp
from protocol import Emit, Generate, Prompts, Setup, run
from write_gguf import write_gguf


def load(setup: Setup) -> tuple[Generate, dict[str, Any]]:
    """As llama.cpp sets itself up (cache in FP16, micro-batches of 512), but for threads, lengths, no prompt cache."""
    params = xllamacpp.CommonParams()
    params.n_parallel = setup.sequences
    params.n_ctx = setup.sequences * setup.length
    params.n_batch = setup.prefill
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup.threads
    params.cache_prompt = False
    params.cache_ram_mib = 0
    with tempfile.TemporaryDirectory() as folder:
        params.model.path = str(Path(folder) / "model.gguf")
        write_gguf(Path(setup.model), Path(params.model.path), q8_0=setup.weights == "int8")
        server = xllamacpp.Server(params)

    def ask(index: int, prompt: list[int], new: int, emit: Emit) -> None:
        def take(chunk: Any) -> None:
            text = "".join(choice["text"] for choice in chunk["choices"])
            emit(index, [int(number) for number in re.findall(r"\d+", text)])

        request = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
        server.handle_completions(request, take)

    def generate(prompts: Prompts, new: int, emit: Emit) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            for asked in [pool.submit(ask, index, prompt, new, emit) for index, prompt in enumerate(prompts)]:
                asked.result()

    names = ("n_parallel", "n_ctx", "n_batch", "n_ubatch", "cache_type_k", "flash_attn_type", "cache_prompt")
    settings = {name: str(getattr(params, name)) for name in names}
    return generate, {"version": xllamacpp.__version__, "settings": settings, "built_for": xllamacpp.get_system_info()}


if __name__ == "__main__":
    run(load)
