"""A verify engine on a tiny target, and a router's part played in a few lines."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dspark.kernels import Kernels, select_kernels
from dspark.messages import Alternative, OpenSequence, Sampling, SequenceKey, StepItem, TapInfo, Verdict
from dspark.models.kv_cache import KVCache
from dspark.models.target import load_target
from services.verifier.engine import EngineSettings, VerifyEngine
from services.verifier.taps import tap_digest

GREEDY = Sampling(temperature=0.0)
CPU = torch.device("cpu")

Drafts = Callable[[Sequence[int]], Sequence[int]]
"""Committed ids, prompt included -> draft tokens."""
Others = Callable[[Sequence[int], Sequence[int]], Sequence[Alternative]]
"""Committed ids and the drafts behind them -> alternatives to these."""


def make_engine(
    path: Path,
    *,
    pages: int = 64,
    dtype: torch.dtype = torch.float32,
    prefix_cache: bool = True,
    kernels: Kernels | None = None,
    cache_of: type[KVCache] = KVCache,
    **settings: Any,
) -> VerifyEngine:
    """An engine on a saved target, pages of 16 positions."""
    model = load_target(path, dtype=dtype, device=CPU, kernels=kernels or select_kernels("auto", CPU))
    own = EngineSettings(**settings)
    cache = cache_of(
        model.config,
        pages=pages,
        dtype=model.kept_dtype,
        device=CPU,
        max_step_rows=own.max_step_tokens,
        prefix_cache=prefix_cache,
    )
    return VerifyEngine(model, cache, own)


def open_one(
    engine: VerifyEngine, name: str, ids: Sequence[int], *, new: int = 32, sampling: Sampling = GREEDY, **more: Any
) -> int:
    """Open a sequence, epoch 0 unless said otherwise; returns the cached length, raises what refuses it."""
    key = SequenceKey(name, more.pop("epoch", 0))
    (opened,) = engine.open([OpenSequence(key, tuple(ids), sampling, len(ids) + new, **more)])
    if opened.error is not None:
        raise opened.error
    return opened.computed_len


def step_one(engine: VerifyEngine, name: str, committed: int, count: int, drafts: Iterable[int] = ()) -> Verdict:
    """One item; raises what refuses it."""
    (verdict,) = engine.step([StepItem(SequenceKey(name, 0), committed, count, tuple(drafts))]).verdicts
    if verdict.error is not None:
        raise verdict.error
    return verdict


class Stream:
    """One sequence as a router drives it: prompt pieces, then drafts from a function, until `new` tokens are there."""

    def __init__(
        self,
        engine: VerifyEngine,
        name: str,
        prompt: Sequence[int],
        *,
        new: int = 24,
        sampling: Sampling = GREEDY,
        drafts: Drafts = lambda _: (),
        others: Others = lambda _ids, _drafts: (),
        piece: int = 512,
        features: bool = False,
    ) -> None:
        self.engine = engine
        self.key = SequenceKey(name, 0)
        self.ids = list(prompt)
        self.proposed = self.accepted = self.offered = self.turned = 0
        self._prompt = len(self.ids)
        self._new = new
        self._drafts, self._others = drafts, others
        self._piece = piece
        self._sent: StepItem | None = None
        self.computed = self.cached = open_one(engine, name, prompt, new=new, sampling=sampling, features=features)

    @property
    def done(self) -> bool:
        return len(self.ids) == self._prompt + self._new

    @property
    def output(self) -> list[int]:
        return self.ids[self._prompt :]

    def item(self) -> StepItem:
        """The next thing to ask for."""
        missing = len(self.ids) - self.computed
        count = min(missing, self._piece)
        drafts = tuple(self._drafts(self.ids)) if count == missing else ()
        self._sent = StepItem(
            self.key, len(self.ids), count, drafts, alternatives=tuple(self._others(self.ids, drafts))
        )
        return self._sent

    def take(self, verdict: Verdict) -> None:
        """What came of it."""
        if verdict.error is not None:
            raise verdict.error
        self.computed = verdict.computed_len
        if verdict.token is not None:
            assert self._sent is not None
            room = self._prompt + self._new - len(self.ids) - 1
            self.proposed += min(len(self._sent.draft_tokens), room)
            self.accepted += verdict.accepted
            self.offered += len(self._sent.alternatives)
            self.turned += verdict.turned
            self.ids += self._sent.committed(verdict)

    def run(self) -> list[int]:
        """Alone to the end; the sequence is closed."""
        drive(self.engine, [self])
        return self.output


def drive(engine: VerifyEngine, streams: Sequence[Stream], *, close: bool = True) -> None:
    """All of them, each step one batch of those not done; closed at their ends unless `close` is false."""
    while live := [stream for stream in streams if not stream.done]:
        result = engine.step([stream.item() for stream in live])
        for stream, verdict in zip(live, result.verdicts, strict=True):
            stream.take(verdict)
        engine.close([stream.key for stream in live if stream.done and close])
    engine.publish()


def garbage(length: int, vocab: int = 512) -> Drafts:
    """Drafts that have nothing to do with the target."""
    return lambda ids: [(7 * len(ids) + 13 * k + ids[-1]) % vocab for k in range(length)]


def oracle(prompt: Sequence[int], output: Sequence[int], length: int, *, wrong_every: int = 0) -> Drafts:
    """The known continuation, every n-th draft token off by one."""
    whole = [*prompt, *output]

    def drafts(ids: Sequence[int]) -> list[int]:
        at = len(ids)
        known = whole[at : at + length]
        return [(t + 1) % 512 if wrong_every and (at + k) % wrong_every == 0 else t for k, t in enumerate(known)]

    return drafts


def make_tap(
    *, layers: tuple[int, ...] = (-1, 1, 3), hidden: int = 64, size: int = 24, bias: bool = False, **changes: Any
) -> tuple[TapInfo, dict[str, torch.Tensor]]:
    """A random tap for the tiny targets."""
    made = torch.Generator().manual_seed(changes.pop("seed", 5))
    tensors = {
        "fc.weight": torch.randn(size, len(layers) * hidden, generator=made) * 0.1,
        "hidden_norm.weight": 1 + 0.1 * torch.randn(size, generator=made),
    }
    if bias:
        tensors["fc.bias"] = torch.randn(size, generator=made)
    fields: dict[str, Any] = {
        "tap_id": "",
        "layer_ids": layers,
        "target_hidden_size": hidden,
        "feature_size": size,
        "norm_eps": 1e-6,
        "target_vocab_size": 512,
    }
    return signed(TapInfo(**(fields | changes)), tensors), tensors


def signed(info: TapInfo, tensors: dict[str, torch.Tensor]) -> TapInfo:
    """The description under its right id."""
    fields = {name: getattr(info, name) for name in info.__dataclass_fields__}
    return TapInfo(**(fields | {"tap_id": tap_digest(info, tensors)}))
