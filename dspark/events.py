"""What a client gets back, as plain frozen values. Knows the protobuf they come from, and no connection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

from dspark.errors import Unavailable
from dspark.messages import ModelInfo, PositionLogprobs, WorkerLoad
from dspark.rpc.codec import decode
from dspark.v1 import generation_pb2 as pb

__all__ = [
    "Completion",
    "Delta",
    "Event",
    "FinishReason",
    "Finished",
    "Loads",
    "ServerInfo",
    "Speculation",
    "Started",
    "Timings",
    "Token",
    "Usage",
    "WorkerStatus",
    "completion_of",
    "event_of",
    "loads_of",
    "server_info_of",
]

FinishReason = Literal["stop", "length", "unknown"]
_REASONS: dict[int, FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream. `seed` gives the same text again in coupled mode."""

    request_id: str
    prompt_tokens: int
    seed: int
    model: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens. The text may lag the ids by a few bytes, so that it is always whole characters."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, as the router measured them: in the queue, and from arrival to the first token and to the end."""

    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """Counts of a completion, or of many added up; before stop truncation, prefill excluded.

    `verified_at[k-1]` counts the k-th draft tokens that were verified with all before them accepted, and
    `accepted_at[k-1]` those of them that were accepted themselves. Of what was verified and accepted, `alternatives`
    and `turned` were tokens beside drafts.
    """

    enabled: bool = False
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    missed_rounds: int = 0
    verified_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    drafter: str = ""
    alternatives: int = 0
    turned: int = 0

    @property
    def rejected(self) -> int:
        """Draft tokens that the target did not keep: wrong ones, those behind a wrong one, unneeded alternatives."""
        return self.verified - self.accepted

    @property
    def tau(self) -> float:
        """Accepted length: tokens gained a round, the bonus token included (DSpark §2.1); 0 before the first round."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def verify_length(self) -> float:
        """Draft tokens verified a round, alternatives included, on average."""
        return self.verified / self.rounds if self.rounds else 0.0

    @property
    def conditional_acceptance(self) -> tuple[float, ...]:
        """For k = 1, 2, …: the share accepted of the k-th draft tokens whose predecessors were all accepted."""
        pairs = zip(self.accepted_at, self.verified_at, strict=True)
        return tuple(accepted / verified for accepted, verified in pairs if verified)

    @staticmethod
    def total(parts: Iterable[Speculation]) -> Speculation:
        """The counts of several completions added up."""
        all_of = list(parts)
        return Speculation(
            enabled=any(part.enabled for part in all_of),
            rounds=sum(part.rounds for part in all_of),
            drafted=sum(part.drafted for part in all_of),
            verified=sum(part.verified for part in all_of),
            accepted=sum(part.accepted for part in all_of),
            missed_rounds=sum(part.missed_rounds for part in all_of),
            verified_at=_columns(part.verified_at for part in all_of),
            accepted_at=_columns(part.accepted_at for part in all_of),
            drafter=next((part.drafter for part in all_of if part.drafter), ""),
            alternatives=sum(part.alternatives for part in all_of),
            turned=sum(part.turned for part in all_of),
        )


def _columns(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Column sums of rows of unequal length."""
    return tuple(sum(column) for column in zip_longest(*rows, fillvalue=0))


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of every completed stream. `stop_match` is the stop string that ended it, if one did."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    speculation: Speculation
    stop_match: str = ""


Event: TypeAlias = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    speculation: Speculation = field(default_factory=Speculation)
    logprobs: tuple[PositionLogprobs, ...] = ()
    stop_match: str = ""
    request_id: str = ""
    seed: int = 0
    model: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second from the end of the queue to the end of the stream."""
        seconds = self.timings.total_seconds - self.timings.queue_seconds
        return len(self.token_ids) / seconds if seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it, the derived figures included."""
        facts = asdict(self)
        facts["tokens_per_second"] = self.tokens_per_second
        facts["speculation"] |= {
            "rejected": self.speculation.rejected,
            "tau": self.speculation.tau,
            "verify_length": self.speculation.verify_length,
            "conditional_acceptance": self.speculation.conditional_acceptance,
        }
        return facts


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a router serves. `drafter` is empty where none is there: it then decodes plainly."""

    model: ModelInfo
    drafter: str
    verify_length: int
    max_message_bytes: int
    version: str
    policy: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as its router sees it; `rounds` and `tokens` are its work for this router."""

    worker_id: str
    role: str
    address: str
    load: WorkerLoad
    reading_age_seconds: float
    rounds: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Loads:
    """How busy a router is."""

    running: int
    queued: int
    queue_limit: int
    workers: tuple[WorkerStatus, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A token's id and its piece of text."""

    id: int
    piece: str


def event_of(response: pb.GenerateResponse) -> Event | None:
    """The event in a stream's message; None for a kind this client does not know yet."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(started.request_id, started.prompt_tokens, started.seed, started.model)
        case "delta":
            delta = response.delta
            return Delta(delta.text, tuple(delta.token_ids), tuple(decode(entry) for entry in delta.logprobs))
        case "finished":
            return _finished(response.finished)
        case _:
            return None


def _finished(message: pb.Finished) -> Finished:
    usage, timings, counts = message.usage, message.timings, message.speculation
    return Finished(
        reason=_REASONS.get(message.reason, "unknown"),
        usage=Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        timings=Timings(timings.queue_seconds, timings.first_token_seconds, timings.total_seconds),
        speculation=Speculation(
            enabled=counts.enabled,
            rounds=counts.rounds,
            drafted=counts.drafted,
            verified=counts.verified,
            accepted=counts.accepted,
            missed_rounds=counts.missed_rounds,
            verified_at=tuple(counts.verified_at),
            accepted_at=tuple(counts.accepted_at),
            drafter=counts.drafter,
            alternatives=counts.alternatives,
            turned=counts.turned,
        ),
        stop_match=message.stop_match,
    )


def completion_of(events: Sequence[Event]) -> Completion:
    """A finished stream's events as one value. `Unavailable` where the stream ended without its last event."""
    started = next((event for event in events if isinstance(event, Started)), None)
    finished = next((event for event in events if isinstance(event, Finished)), None)
    if started is None or finished is None:
        raise Unavailable("the router ended the stream before the completion was finished")
    deltas = [event for event in events if isinstance(event, Delta)]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=finished.reason,
        usage=finished.usage,
        timings=finished.timings,
        speculation=finished.speculation,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        stop_match=finished.stop_match,
        request_id=started.request_id,
        seed=started.seed,
        model=started.model,
    )


def server_info_of(message: pb.DescribeResponse) -> ServerInfo:
    """What `Describe` answered."""
    return ServerInfo(
        decode(message.model),
        message.drafter,
        message.verify_length,
        message.max_message_bytes,
        message.version,
        message.policy,
    )


def loads_of(message: pb.GetLoadsResponse) -> Loads:
    """What `GetLoads` answered."""
    workers = tuple(
        WorkerStatus(w.worker_id, w.role, w.address, decode(w.load), w.reading_age_seconds, w.rounds, w.tokens)
        for w in message.workers
    )
    return Loads(message.running, message.queued, message.queue_limit, workers)
