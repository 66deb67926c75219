"""Has the target answer prompts through the verify engine, as many at once as the batch holds.

Answers are drawn in coupled mode, so each is a function of its prompt, temperature and seed alone: a run that was
stopped goes on with the same answers, whatever shared a batch with what. Knows the engine; leaves prompts to
`training.prompts` and files to `training.dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dspark.errors import ConfigError
from dspark.messages import OpenSequence, Sampling, SequenceKey, StepItem
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from services.verifier.engine import EngineSettings, VerifyEngine
from training.dataset import Response
from training.prompts import Prompt

__all__ = ["Responder"]

_STEP_ROWS = 1024  # at least, and so many a text: prompts get in beside the texts that run
_ROWS_A_TEXT = 4
_PAGE_SIZE = 16


@dataclass(slots=True)
class _Running:
    number: int
    prompt: Prompt
    request: OpenSequence
    token_ids: list[int]
    computed: int = 0

    @property
    def missing(self) -> int:
        return len(self.token_ids) - self.computed


class Responder:
    """Answers prompts of at most `longest` tokens with at most `max_new` tokens each, `batch` at a time."""

    def __init__(self, target: TargetModel, *, longest: int, max_new: int, batch: int) -> None:
        room = longest + max_new
        if room > target.config.max_context:
            raise ConfigError(
                f"prompts and responses of {room} tokens are over the model's {target.config.max_context}"
            )
        pages = batch * (-(-room // _PAGE_SIZE) + 1)
        cache = KVCache(target.config, pages=pages, dtype=target.kept_dtype, device=target.device, prefix_cache=False)
        self._rows = max(_STEP_ROWS, _ROWS_A_TEXT * batch)
        self._engine = VerifyEngine(target, cache, EngineSettings(max_step_tokens=self._rows))
        self._eos = frozenset(target.config.eos_token_ids)
        self._max_new = max_new
        self._batch = batch

    @torch.inference_mode()
    def answer(
        self, prompts: Iterable[tuple[int, Prompt]], stepped: Callable[[int], None]
    ) -> Iterator[tuple[int, Response]]:
        """Numbered answers as they end; `stepped` hears after every step how many tokens it gave."""
        waiting = iter(prompts)
        running: list[_Running] = []
        while True:
            self._fill(running, waiting)
            if not running:
                return
            stepped(self._step(running))
            ended = [one for one in running if self._ended(one)]
            running = [one for one in running if not self._ended(one)]
            self._engine.close([one.request.key for one in ended])
            for one in ended:
                yield one.number, Response(tuple(one.token_ids), len(one.prompt.token_ids), one.prompt.temperature)

    def _fill(self, running: list[_Running], waiting: Iterator[tuple[int, Prompt]]) -> None:
        opened: list[_Running] = []
        while len(running) + len(opened) < self._batch and (following := next(waiting, None)) is not None:
            number, prompt = following
            opened.append(_Running(number, prompt, self._request(number, prompt), list(prompt.token_ids)))
        for answer in self._engine.open([one.request for one in opened]):
            if answer.error is not None:
                raise answer.error
        running += opened

    def _request(self, number: int, prompt: Prompt) -> OpenSequence:
        return OpenSequence(
            key=SequenceKey(str(number), 1),
            token_ids=prompt.token_ids,
            max_len=len(prompt.token_ids) + self._max_new,
            sampling=Sampling(temperature=prompt.temperature, seed=prompt.seed),
            features=False,
        )

    def _step(self, running: Sequence[_Running]) -> int:
        """One step over what each text lacks, as far as rows go round; a long prompt takes several. Tokens it gave."""
        items, served, left, given = [], [], self._rows, 0
        for one in sorted(running, key=lambda one: one.missing):
            count = min(one.missing, left)
            if count:
                left -= count
                served.append(one)
                items.append(StepItem(one.request.key, len(one.token_ids), count))
        for one, item, verdict in zip(served, items, self._engine.step(items).verdicts, strict=True):
            if verdict.error is not None:
                raise verdict.error
            one.computed += item.count
            if verdict.token is not None:
                one.token_ids.append(verdict.token)
                given += 1
        return given

    def _ended(self, one: _Running) -> bool:
        new = len(one.token_ids) - len(one.prompt.token_ids)
        return new >= self._max_new or (new > 0 and one.token_ids[-1] in self._eos)
