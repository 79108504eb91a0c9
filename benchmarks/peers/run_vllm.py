"""vLLM on a CPU, to be measured: its engine in this process, without server, tokenizer or statistics."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from protocol import Emit, Generate, Prompts, Setup, run


def load(setup: Setup) -> tuple[Generate, dict[str, Any]]:
    """As vLLM sets itself up, but for threads, lengths, and no prefix caching."""
    bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[: setup.threads]))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process for the engine
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),  # what it compiles: a minute that the next start saves
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.update(environment)
    import vllm  # reads the environment
    from vllm.sampling_params import RequestOutputKind

    how = {
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[setup.weights],
        "enable_prefix_caching": False,
        "max_model_len": setup.length,
        "max_num_seqs": setup.sequences,
        "max_num_batched_tokens": max(setup.prefill, setup.length),
    }
    engine = vllm.LLM(setup.model, skip_tokenizer_init=True, seed=0, **how).llm_engine

    def generate(prompts: Prompts, new: int, emit: Emit) -> None:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                emit(int(output.request_id), list(output.outputs[0].token_ids))

    return generate, {"version": vllm.__version__, "settings": environment | how}


def preload_openmp() -> None:
    """Start again with Intel's OpenMP, as vLLM's guide for CPUs asks; vLLM's package brings it."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists() and str(library) not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(library)})


if __name__ == "__main__":
    preload_openmp()
    run(load)
