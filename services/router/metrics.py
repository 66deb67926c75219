"""What the router counts, for Prometheus. Suffixes and meanings are vLLM's where vLLM has the metric."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark.messages import ProposeResult, StepResult
from services.router.outlet import Finished
from services.router.scheduling.survival import Report

__all__ = ["PHASES", "Metrics"]

PHASES = ("propose", "schedule", "verify", "commit", "publish", "learn")
"""Parts of a round, as the router's loop spends its time; `publish` and `learn` overlap the next round's waiting."""

ENGINE_PARTS = ("draft_forward", "draft_total", "feature_wait", "draft_queue")
VERIFY_PARTS = ("verify_forward", "verify_sample", "verify_total", "verify_queue")
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)


class Metrics:
    """Counters, gauges and histograms of one router.

    Seconds of a round are split two ways: `dspark_router_phase_seconds_total{phase}` by what the router's loop did,
    `dspark_router_engine_seconds_total{part}` by what the workers' replies say of their time. The verifiers' idle
    share while sequences were runnable is 1 - engine{verify_total} / `dspark_router_runnable_seconds_total`.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry`: where they are shown; by default one that nobody reads."""
        own = self.registry = registry or CollectorRegistry()
        self.running = Gauge("dspark_num_requests_running", "Requests open at a verify worker", registry=own)
        self.waiting = Gauge("dspark_num_requests_waiting", "Requests in the queue", registry=own)
        self.workers = Gauge("dspark_router_workers", "Connected workers", ["role"], registry=own)
        self.store_age = Gauge("dspark_router_store_age_seconds", "Age of the last good store reading", registry=own)
        self.prompt_tokens = Counter("dspark_prompt_tokens", "Tokens of accepted prompts", registry=own)
        self.generation_tokens = Counter("dspark_generation_tokens", "Tokens committed", registry=own)
        self.succeeded = Counter("dspark_request_success", "Completed requests", ["finished_reason"], registry=own)
        self.ended = Counter("dspark_request_failure", "Requests that ended otherwise", ["error"], registry=own)
        self.first_token = Histogram(
            "dspark_time_to_first_token_seconds", "From arrival", buckets=SECONDS, registry=own
        )
        self.latency = Histogram("dspark_e2e_request_latency_seconds", "From arrival", buckets=SECONDS, registry=own)
        self.queue_time = Histogram("dspark_request_queue_time_seconds", "Until opened", buckets=SECONDS, registry=own)
        self.per_token = Histogram(
            "dspark_time_per_output_token_seconds",
            "After the first token, mean of a request",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
            registry=own,
        )
        self.drafts = Counter("dspark_spec_decode_num_drafts", "Rounds that verified drafts", registry=own)
        self.draft_tokens = Counter("dspark_spec_decode_num_draft_tokens", "Draft tokens verified", registry=own)
        self.accepted = Counter("dspark_spec_decode_num_accepted_tokens", "Draft tokens accepted", registry=own)
        self.accepted_at = Counter(
            "dspark_spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted", ["position"], registry=own
        )
        self.proposed = Counter("dspark_router_proposed_tokens", "Draft tokens proposed", registry=own)
        self.rounds = Counter("dspark_router_rounds", "Verify steps of sequences that yielded a token", registry=own)
        self.steps = Counter("dspark_router_steps", "Batches sent to verify workers", registry=own)
        self.reopened = Counter("dspark_router_reopened", "Sequences moved to another opening", ["cause"], registry=own)
        self._missed = Counter(
            "dspark_router_missed_drafts", "Rounds without a proposal although wanted", ["cause"], registry=own
        )
        self._unasked_blocks = Counter(
            "dspark_router_unasked_blocks", "Blocks drafted without being asked for", ["fate"], registry=own
        )
        self.runnable_seconds = Counter(
            "dspark_router_runnable_seconds", "Time with sequences to step, summed over verify workers", registry=own
        )
        phases = Counter("dspark_router_phase_seconds", "The loop's time by phase", ["phase"], registry=own)
        parts = Counter("dspark_router_engine_seconds", "Workers' time by part", ["part"], registry=own)
        self._phases = {phase: phases.labels(phase) for phase in PHASES}
        self._parts = {part: parts.labels(part) for part in (*ENGINE_PARTS, *VERIFY_PARTS)}
        self.step_error = Histogram(
            "dspark_router_step_time_error",
            "How far expected step times were off, as a share of the observed",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0),
            registry=own,
        )
        self.survival = Gauge(
            "dspark_router_survival",
            "Of drafts verified lately: share that survived, and what the drafter said of them, raw and corrected",
            ["mode", "drafter", "position", "kind"],
            registry=own,
        )
        self._positions: dict[int, Counter] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name].inc(time.perf_counter() - began)

    def connected(self, **count_by_role: int) -> None:
        """Present numbers of connected workers."""
        for role, count in count_by_role.items():
            self.workers.labels(role).set(count)

    def missed(self, cause: str, count: int = 1) -> None:
        """Rounds of sequences go without drafts: late, features, unattached, lost, unusable."""
        self._missed.labels(cause).inc(count)

    def unasked_came(self, blocks: int) -> None:
        """Blocks came unasked; those that no round uses were drafted for nothing."""
        self._unasked_blocks.labels("came").inc(blocks)

    def unasked_used(self, blocks: int) -> None:
        """A round used them."""
        self._unasked_blocks.labels("used").inc(blocks)

    def drafted(self, result: ProposeResult) -> None:
        """A draft worker answered in time."""
        self.proposed.inc(sum(len(proposal.tokens) for proposal in result.proposals))
        self._parts["draft_forward"].inc(result.forward_seconds)
        self._parts["draft_total"].inc(result.total_seconds)
        self._parts["feature_wait"].inc(result.feature_wait_seconds)
        self._parts["draft_queue"].inc(result.queue_seconds)

    def verified(self, result: StepResult) -> None:
        """A verify worker answered."""
        self.steps.inc()
        self._parts["verify_forward"].inc(result.forward_seconds)
        self._parts["verify_sample"].inc(result.sample_seconds)
        self._parts["verify_total"].inc(result.total_seconds)
        self._parts["verify_queue"].inc(result.queue_seconds)

    def expected(self, seconds: float, observed: float) -> None:
        """How long a step was expected to take, 0 if nothing was, and took."""
        if seconds and observed:
            self.step_error.observe(abs(seconds / observed - 1))

    def tracked(self, mode: str, drafter: str, report: Report) -> None:
        """Survival by position of one mode and drafter."""
        for position, count in enumerate(report.trials, start=1):
            if count >= 1:
                for kind in ("observed", "predicted", "corrected"):
                    value = getattr(report, kind)[position - 1]
                    self.survival.labels(mode, drafter, str(position), kind).set(value)

    def committed(self, rounds: int, verified: list[int], accepted: list[int]) -> None:
        """What one batch's rounds came to; the lists hold one number per round that verified drafts."""
        self.rounds.inc(rounds)
        self.drafts.inc(len(verified))
        self.draft_tokens.inc(sum(verified))
        self.accepted.inc(sum(accepted))
        for position in range(max(accepted, default=0)):
            self._at(position).inc(sum(count > position for count in accepted))

    def finished(self, end: Finished) -> None:
        """A request is complete."""
        self.succeeded.labels(end.reason.value).inc()
        self.latency.observe(end.total_seconds)
        if end.completion_tokens > 1:
            self.per_token.observe((end.total_seconds - end.first_token_seconds) / (end.completion_tokens - 1))

    def _at(self, position: int) -> Counter:
        if position not in self._positions:
            self._positions[position] = self.accepted_at.labels(str(position))
        return self._positions[position]
