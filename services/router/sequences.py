"""The router's memory of one request in progress: its committed ids, where it is open, and what it came to so far.

Only the event loop touches it. Positions are those of `dspark.messages`: N = `committed_len` counts prompt and emitted
tokens, the anchor is the last of them, and `computed_len` of their positions have K/V at the verify worker.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from dspark.errors import DSparkError
from dspark.messages import AttachSequence, OpenSequence, PositionLogprobs, SequenceKey
from services.router.counts import Counts
from services.router.finish import FinishReason, StopText
from services.router.outlet import Delta, Finished, Outlet
from services.router.requests import Request, ServedModel

if TYPE_CHECKING:
    from services.router.cohort import Cohort
    from services.router.links import DraftLink

__all__ = ["Sequence"]

MAX_FAILURES = 10


class Sequence:
    """A request's tokens on their way through the workers.

    Attributes:
        numerics: the numerics fingerprint it started under; only workers of the same may go on with it.
        cohort: the sequences of the verify worker where it is open; None while it waits.
        drafter: the draft worker that it is attached to, if any.
        attaching: an attachment is under way.
        dormant: it is not attached before somebody is to draft for it.
        draft_retry_at: `time.monotonic()` before which no draft worker is tried again.
        slot, setting: its place in the router's memory of drafts, and what it is remembered under.
        followed: its drafter has stayed with it, so can, and has had its features.
        steady: rounds in a row that have asked for drafts; below 0 while its drafter is not to stay with it.
        spared: rounds in a row that were better off without drafts for it.
        quiet: rounds in a row in which it was not to be drafted for; chosen: in which it was worth while.
        standing: draft tokens that its drafter sends unasked behind whatever is committed; 0: none.
        skip_rounds, misses: rounds to go without asking the drafter, which missed this many in a row.
        failures: openings and steps that came to nothing since the last committed token.
        completion_tokens: tokens handed to the client.
        ended: no worker is to do anything for it any more.
        on_opened: called once, when it has left the queue for the first time.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        *,
        outlet: Outlet | None = None,
        on_opened: Callable[[], None] | None = None,
    ) -> None:
        self.request = request
        self.model = model
        self.outlet = outlet or Outlet()
        self.on_opened = on_opened
        self.sequence_id = uuid.uuid4().hex  # request ids of two routers may collide
        self.epoch = 0
        self.token_ids = list(request.prompt)
        self.computed_len = 0
        self.numerics: str | None = None
        self.cohort: Cohort | None = None
        self.drafter: DraftLink | None = None
        self.attaching = False
        self.dormant = False
        self.draft_retry_at = 0.0
        self.slot: int | None = None
        self.setting = -1
        self.followed = False
        self.steady = 0
        self.spared = 0
        self.quiet = 0
        self.chosen = 0
        self.standing = 0
        self.skip_rounds = 0
        self.misses = 0
        self.failures = 0
        self.ended = False
        self.counts = Counts()
        self.drafter_name = ""
        self.cached_tokens = 0
        self._running_epoch = 0
        self._text = StopText(model.tokenizer, request.stop, whole=request.whole)
        self.completion_tokens = 0
        self._arrived = time.monotonic()
        self._placed: float | None = None
        self._first_token: float | None = None

    # ------------------------------------------------------------ what workers are told

    @property
    def key(self) -> SequenceKey:
        """Its name at the workers; the epoch grows whenever it is opened anew."""
        return SequenceKey(self.sequence_id, self.epoch)

    @property
    def committed_len(self) -> int:
        """N."""
        return len(self.token_ids)

    @property
    def left(self) -> int:
        """Tokens that it may still emit."""
        return self.request.max_len - len(self.token_ids)

    @property
    def uncomputed(self) -> int:
        """Committed positions without K/V; 1, the anchor, in a running sequence."""
        return len(self.token_ids) - self.computed_len

    @property
    def hopeless(self) -> bool:
        """Whether it has failed so often without a new token that trying again would not end."""
        return self.failures >= MAX_FAILURES

    def opening(self, *, features: bool) -> OpenSequence:
        """The message that opens it, under a new epoch, with every token committed so far."""
        self.epoch += 1
        return OpenSequence(
            key=self.key,
            token_ids=tuple(self.token_ids),
            sampling=self.request.sampling,
            max_len=self.request.max_len,
            features=features,
            request_id=self.request.request_id,
        )

    def attachment(self, verifier_address: str) -> AttachSequence:
        """The message that attaches it to a draft worker."""
        return AttachSequence(
            key=self.key,
            verifier_address=verifier_address,
            sampling=self.request.sampling,
            max_len=self.request.max_len,
            request_id=self.request.request_id,
        )

    # ------------------------------------------------------------ what happens to it

    def opened(self, computed_len: int, numerics: str) -> None:
        """A verify worker has it open, with K/V for the first `computed_len` positions."""
        self.computed_len = computed_len
        self.numerics = numerics
        if self._placed is None:
            self._placed = time.monotonic()
            self.cached_tokens = computed_len
            if self.on_opened is not None:
                self.on_opened()

    @property
    def running(self) -> bool:
        """Whether it has yielded a token where it is open, so that its next step is a round."""
        return self._running_epoch == self.epoch

    def commit(self, tokens: list[int], computed_len: int) -> None:
        """Appends new tokens, the last being the next anchor."""
        self.token_ids += tokens
        self.computed_len = computed_len
        self._running_epoch = self.epoch
        self.failures = 0

    def undrafted(self) -> None:
        """It has no draft worker any more."""
        self.drafter = None
        self.followed = False
        self.steady = self.standing = 0

    # ------------------------------------------------------------ what the client sees

    def publish(
        self, tokens: list[int], logprobs: tuple[PositionLogprobs, ...], reason: FinishReason | None
    ) -> FinishReason | None:
        """Hands tokens to the client; returns why the request is complete, a stop string included."""
        text = []
        for count, token in enumerate(tokens, start=1):
            stops = reason is FinishReason.STOP and count == len(tokens)  # the stop token has no text
            text.append("" if stops else self._text.push(token))
            if self._text.matched is not None:
                tokens, logprobs, reason = tokens[:count], logprobs[:count], FinishReason.STOP
                break
        if reason is not None:
            text.append(self._text.flush())
            reason = FinishReason.STOP if self._text.matched is not None else reason
        self._first_token = self._first_token or time.monotonic()
        self.completion_tokens += len(tokens)
        self.outlet.push(Delta("".join(text), tuple(tokens), logprobs))
        return reason

    def give_up(self, error: DSparkError) -> None:
        """Tells the client why no more comes, behind what it has not heard yet. No effect once it has ended."""
        if self._text.late and not self.outlet.ended:
            self.outlet.push(Delta(self._text.flush()))
        self.outlet.end(error)

    @property
    def seconds(self) -> float:
        """Since arrival."""
        return time.monotonic() - self._arrived

    def finished(self, reason: FinishReason) -> Finished:
        """The client's last message."""
        return Finished(
            reason=reason,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            queue_seconds=self.queue_seconds,
            first_token_seconds=self.first_token_seconds,
            total_seconds=self.seconds,
            speculation=self.request.speculation,
            counts=self.counts,
            drafter=self.drafter_name,
            stop_match=self._text.matched or "",
        )

    @property
    def queue_seconds(self) -> float:
        """From arrival to the first opening at a verify worker."""
        return (self._placed or time.monotonic()) - self._arrived

    @property
    def first_token_seconds(self) -> float:
        """From arrival to the first token, 0 before it."""
        return 0.0 if self._first_token is None else self._first_token - self._arrived

    def story(self) -> dict[str, object]:
        """What a log line tells of it once it has ended."""
        return {
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 4),
            "rounds": self.counts.rounds,
            "drafted": self.counts.drafted,
            "verified": self.counts.verified,
            "accepted": self.counts.accepted,
            "missed_rounds": self.counts.missed_rounds,
            "drafter": self.drafter_name,
            "epoch": self.epoch,
        }
