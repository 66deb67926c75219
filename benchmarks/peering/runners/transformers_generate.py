"""transformers' `generate` as a peer, on a GPU where there is one: fixed batches, as it has no continuous ones here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.peering.runners.line_protocol import serve


class Transformers:
    """A model in bfloat16."""

    def load(self, *, model: str, gguf: str | None, threads: int, streams: Sequence[int], context: int) -> Any:  # noqa: ARG002
        """On the GPU, else on so many threads."""
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
        self._model = loaded.eval()
        self._model.generation_config.eos_token_id = None  # nothing ends early
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return {"engine": versions, "device": device, "settings": {"threads": threads, "dtype": "bfloat16"}}

    def run(
        self, *, prompts: Sequence[Sequence[int]], streams: int, temperature: float, max_tokens: int, seed: int
    ) -> list[list[int]]:
        """Batch after batch of `streams` prompts."""
        torch.manual_seed(seed)
        batches = [prompts[begin : begin + streams] for begin in range(0, len(prompts), streams)]
        return [ids for batch in batches for ids in self._batch(batch, temperature, max_tokens)]

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]], temperature: float, max_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        made = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            **(sampling or {"do_sample": False}),
        )
        return [[int(token) for token in row] for row in made[:, longest:].tolist()]


if __name__ == "__main__":
    serve(Transformers())
