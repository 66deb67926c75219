"""vLLM as a peer: its engine in-process, without an HTTP server in front, which can only help it.

Settings are those of its documentation for CPUs where they were measured to be fastest (docs/peers.md): every thread
bound to a core of its own, compiled, no prefix cache, a K/V cache with room for all streams.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peering.runners.line_protocol import serve


def set_up(threads: int) -> dict[str, str]:
    """What vLLM reads from the environment; what is set there already stays. Its workers are spawned and inherit it."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    # By itself it leaves one core idle for its other processes: half of a machine with two.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))  # else it takes a thread less "for serving"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    names = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "LD_PRELOAD")
    return {name: os.environ.get(name, "") for name in names}


class Vllm:
    """The engine of `vllm.LLM`, fed one request for each that ends. `tuned`: set up its environment first."""

    def __init__(self, *, tuned: bool) -> None:
        self._tuned = tuned

    def load(self, *, model: str, gguf: str | None, threads: int, streams: Sequence[int], context: int) -> Any:  # noqa: ARG002
        """Compiles too: minutes, the first time."""
        settings = set_up(threads) if self._tuned else {}
        import vllm  # noqa: PLC0415 - reads the environment
        from vllm.platforms import current_platform  # noqa: PLC0415

        options = {
            "dtype": "bfloat16",
            "max_model_len": context,
            "max_num_seqs": max(streams),
            "enable_prefix_caching": False,
        }
        llm = vllm.LLM(model, skip_tokenizer_init=True, disable_log_stats=True, **options)
        self._engine = llm.llm_engine
        device = current_platform.device_type
        return {"engine": f"vLLM {vllm.__version__}", "device": device, "settings": settings | options}

    def run(
        self, *, prompts: Sequence[Sequence[int]], streams: int, temperature: float, max_tokens: int, seed: int
    ) -> list[list[int]]:
        """A closed loop over the engine's steps."""
        waiting = list(enumerate(prompts))[::-1]
        done: dict[int, list[int]] = {}
        running = 0
        while waiting or running:
            while waiting and running < streams:
                index, ids = waiting.pop()
                self._add(index, ids, temperature, max_tokens, seed + index)
                running += 1
            for output in self._engine.step():
                if output.finished:
                    done[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
                    running -= 1
        return [done[index] for index in range(len(prompts))]

    def _add(self, index: int, ids: Sequence[int], temperature: float, max_tokens: int, seed: int) -> None:
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        # Its own seeds make a generator a request, which costs it speed: nobody needs its draws to be reproducible.
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        del seed
        self._engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)


if __name__ == "__main__":
    serve(Vllm(tuned="--as-installed" not in sys.argv))
