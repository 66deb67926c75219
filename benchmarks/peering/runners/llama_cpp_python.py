"""llama.cpp as a peer, through llama-cpp-python's bindings of its C interface.

All streams share a batch, as in llama.cpp's own server: the package's `Llama` class knows one stream only. A stream's
cache is cleared for each request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp

from benchmarks.peering.runners.line_protocol import serve

BATCH = 2048


@dataclass
class Slot:
    """One stream: the request that it works on, and its next token."""

    index: int
    sampler: Any
    position: int
    generated: list[int] = field(default_factory=list)


class LlamaCpp:
    """A model, and for each number of streams a context of that size."""

    def load(self, *, model: str, gguf: str | None, threads: int, streams: Sequence[int], context: int) -> Any:  # noqa: ARG002
        """Needs the GGUF file."""
        if gguf is None:
            raise ValueError("llama.cpp reads GGUF files: name one with --gguf")
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {gguf}")
        self._contexts = {count: self._context(count, threads, context) for count in streams}
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        system = llama_cpp.llama_print_system_info().decode()
        settings = {"threads": threads, "gguf": gguf, "system": " ".join(system.split())}
        return {"engine": f"llama-cpp-python {llama_cpp.__version__}", "device": "cpu", "settings": settings}

    def _context(self, streams: int, threads: int, context: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * (-(-context // 256) * 256)
        params.n_seq_max = streams
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = threads
        made = llama_cpp.llama_init_from_model(self._model, params)
        if not made:
            raise ValueError(f"llama.cpp made no context for {streams} streams of {context} tokens")
        return made

    def run(
        self, *, prompts: Sequence[Sequence[int]], streams: int, temperature: float, max_tokens: int, seed: int
    ) -> list[list[int]]:
        """Each step decodes one token a running stream, and the prompts of those that begin."""
        self._now = self._contexts[streams]
        waiting = list(enumerate(prompts))[::-1]
        slots: dict[int, Slot] = {}
        done: dict[int, list[int]] = {}
        while waiting or slots:
            rows = self._fill(slots, waiting, streams, lambda index: _sampler(temperature, seed + index))
            if llama_cpp.llama_decode(self._now, self._batch):
                raise RuntimeError("llama_decode failed")
            for number, row in rows.items():
                self._choose(slots[number], row)
            for number in [n for n, slot in slots.items() if len(slot.generated) == max_tokens]:
                ended = slots.pop(number)
                llama_cpp.llama_sampler_free(ended.sampler)
                done[ended.index] = ended.generated
        return [done[index] for index in range(len(prompts))]

    def _fill(self, slots: dict[int, Slot], waiting: list[Any], streams: int, sampler: Any) -> dict[int, int]:
        """The batch of one step, and in which row of it each stream's next token is chosen."""
        self._batch.n_tokens = 0
        rows = {n: self._add(n, slot.generated[-1], slot.position, last=True) for n, slot in slots.items()}
        for number in (n for n in range(streams) if n not in slots):
            if not waiting or self._batch.n_tokens + len(waiting[-1][1]) > BATCH:
                break
            index, ids = waiting.pop()
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._now), number, -1, -1)
            added = [self._add(number, token, at, last=at == len(ids) - 1) for at, token in enumerate(ids)]
            rows[number] = added[-1]
            slots[number] = Slot(index, sampler(index), len(ids) - 1)
        return rows

    def _add(self, stream: int, token: int, position: int, *, last: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, last
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
        batch.n_tokens = row + 1
        return int(row)

    def _choose(self, slot: Slot, row: int) -> None:
        slot.generated.append(llama_cpp.llama_sampler_sample(slot.sampler, self._now, ctypes.c_int32(row)))
        slot.position += 1


def _sampler(temperature: float, seed: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if temperature == 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed % 2**32))
    return chain


if __name__ == "__main__":
    serve(LlamaCpp())
