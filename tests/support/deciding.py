"""A router's part between the two real engines, a sequence at a time: what offline rounds are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark.messages import (
    Alternative,
    AttachSequence,
    FeatureBlock,
    OpenSequence,
    ProposeItem,
    Sampling,
    SequenceKey,
    SparseDistribution,
    StepItem,
)
from dspark.models.drafters import Drafter
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.verifier.engine import VerifyEngine


@dataclass
class Decoded:
    """Ids, prompt included; of every round the committed length before it, its drafts and how many stood.

    `turned` rounds took an alternative, of `offered`.
    """

    token_ids: list[int]
    committed: list[int] = field(default_factory=list)
    drafts: list[tuple[int, ...]] = field(default_factory=list)
    distributions: list[tuple[SparseDistribution, ...]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    features: bytes = b""
    offered: int = 0
    turned: int = 0


class Decoder:
    """A target with its drafter."""

    def __init__(
        self, target: TargetModel, drafter: Drafter, *, draft_top_k: int = 64, alternatives: bool = False
    ) -> None:
        self._with_alternatives = alternatives
        cache = KVCache(target.config, pages=256, dtype=target.kept_dtype, device=target.device)
        self._verifier = VerifyEngine(target, cache)
        self._verifier.register_tap(drafter.tap, drafter.tap_tensors())
        self._drafts = DraftEngine(
            drafter, DraftChooser(draft_top_k=draft_top_k), target.kernels, context_positions=target.config.max_context
        )
        self._drafter = drafter
        self._eos = target.config.eos_token_ids
        self._count = 0

    def decode(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int, *, verify_length: int = 99) -> Decoded:
        """One request, as a router runs it: prompt, rounds, end-of-sequence token or `max_tokens`."""
        self._count += 1
        key, limit = SequenceKey(str(self._count), 0), len(prompt) + max_tokens
        (opened,) = self._verifier.open([OpenSequence(key, tuple(prompt), sampling, limit)])
        self._drafts.attach(AttachSequence(key, "", sampling, limit))
        (verdict,) = self._verifier.step([StepItem(key, len(prompt), len(prompt) - opened.computed_len)]).verdicts
        assert verdict.token is not None
        done = Decoded([*prompt, verdict.token])
        while len(done.token_ids) < limit and done.token_ids[-1] not in self._eos:
            self._round(key, done, min(limit - len(done.token_ids) - 1, verify_length))
        done.features = self._read(key, 0, len(done.token_ids) - 2)
        self._verifier.close([key])
        self._drafts.detach([key])
        return done

    def _round(self, key: SequenceKey, done: Decoded, wanted: int) -> None:
        n, start = len(done.token_ids), self._drafts.length(key) or 0
        ids, data = tuple(done.token_ids[start + 1 : n]), self._read(key, start, n - 1)
        self._drafts.append_features([FeatureBlock(key, start, n - 1 - start, data, token_ids=ids)])
        (block,) = self._drafts.propose([ProposeItem(key, n, done.token_ids[-1], wanted)]).proposals
        assert block.error is None
        others = tuple(Alternative(place, token) for place, token in enumerate(block.alternatives, 1))
        others = tuple(one for one in others if one.token != block.tokens[one.place - 1] and self._with_alternatives)
        item = StepItem(key, n, 1, block.tokens, block.distributions, alternatives=others)
        (verdict,) = self._verifier.step([item]).verdicts
        assert verdict.token is not None
        new = item.committed(verdict)
        done.offered += len(others)
        done.turned += verdict.turned
        stops = [at for at, token in enumerate(new) if token in self._eos]
        done.committed.append(n)
        done.drafts.append(block.tokens)
        done.distributions.append(block.distributions)
        done.accepted.append(verdict.accepted)
        done.token_ids += new[: stops[0] + 1] if stops else new

    def _read(self, key: SequenceKey, start: int, end: int) -> bytes:
        self._verifier.publish()
        pages = self._verifier._sequences[key.sequence_id].cached.full_pages
        return self._verifier._features.read(self._drafter.tap.tap_id, pages, start, end)
