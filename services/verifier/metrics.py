"""What the verify worker counts, for Prometheus. Suffixes and meanings are vLLM's where vLLM has the metric."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark.messages import StepResult, Verdict, WorkerLoad
from services.verifier.sequences import Work

__all__ = ["Metrics"]

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.096, 0.128, 0.25, 0.5, 1.0, 2.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Counters, gauges and histograms of one engine."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry`: where they are shown; by default one that nobody reads."""
        own = registry or CollectorRegistry()
        self.registry = own
        self.prompt_tokens = Counter("dspark_prompt_tokens", "Prompt positions computed", registry=own)
        self.generation_tokens = Counter("dspark_generation_tokens", "Tokens committed", registry=own)
        self.drafts = Counter("dspark_spec_decode_num_drafts", "Items that carried drafts", registry=own)
        self.draft_tokens = Counter("dspark_spec_decode_num_draft_tokens", "Draft tokens verified", registry=own)
        self.accepted = Counter("dspark_spec_decode_num_accepted_tokens", "Draft tokens accepted", registry=own)
        self.accepted_at = Counter(
            "dspark_spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted", ["position"], registry=own
        )
        self.prefix_queries = Counter("dspark_prefix_cache_queries", "Tokens looked up", registry=own)
        self.prefix_hits = Counter("dspark_prefix_cache_hits", "Tokens found in the prefix cache", registry=own)
        self.recomputed = Counter("dspark_features_recomputed", "Positions recomputed for their features", registry=own)
        self.refused = Counter("dspark_refused_items", "Items answered by an error", ["error"], registry=own)
        self.rows = Histogram("dspark_iteration_tokens_total", "Rows of a step", buckets=TOKENS, registry=own)
        self.seconds = Histogram(
            "dspark_verify_step_seconds", "Time of a step, by part", ["part"], buckets=SECONDS, registry=own
        )
        self._positions: dict[int, Counter] = {}

    def committed(self, work: Work, verdict: Verdict) -> None:
        """One item was computed."""
        anchor = int(work.reaches_anchor)
        self.prompt_tokens.inc(work.count - anchor)
        if verdict.token is not None:
            self.generation_tokens.inc(verdict.accepted + verdict.turned + 1)
        if work.draft_tokens:
            self.drafts.inc()
            self.draft_tokens.inc(work.rows - work.count)
            self.accepted.inc(verdict.accepted + verdict.turned)
        for position in range(verdict.accepted):
            self._at(position).inc()

    def stepped(self, result: StepResult, rows: int) -> None:
        """One step is done."""
        self.rows.observe(rows)
        self.seconds.labels("forward").observe(result.forward_seconds)
        self.seconds.labels("sample").observe(result.sample_seconds)
        self.seconds.labels("total").observe(result.total_seconds)

    def follow(self, load: Callable[[], WorkerLoad]) -> None:
        """Read the gauges from a worker's load whenever somebody asks."""
        running = Gauge("dspark_num_requests_running", "Sequences open", registry=self.registry)
        running.set_function(lambda: load().running)
        waiting = Gauge("dspark_num_requests_waiting", "Calls queued for the engine", registry=self.registry)
        waiting.set_function(lambda: load().waiting)
        usage = Gauge("dspark_kv_cache_usage_perc", "Share of pages in use, 1 is all", registry=self.registry)
        usage.set_function(lambda: 1.0 - load().free_pages / max(1, load().total_pages))

    def _at(self, position: int) -> Counter:
        if position not in self._positions:
            self._positions[position] = self.accepted_at.labels(str(position))
        return self._positions[position]
