"""What a draft worker counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark.messages import ProposeResult, WorkerLoad

__all__ = ["DraftMetrics"]

_SECONDS = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0)


class DraftMetrics:
    """Counters, gauges and histograms of one draft worker."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry`: where they are shown; by default one that nobody reads."""
        own = self.registry = registry or CollectorRegistry()
        self._proposals = Counter("dspark_draft_proposals", "Blocks drafted", registry=own)
        self._tokens = Counter("dspark_spec_decode_num_draft_tokens", "Draft tokens proposed", registry=own)
        self._missed = Counter("dspark_draft_missed", "Blocks not drafted because features were late", registry=own)
        self._refused = Counter("dspark_refused_items", "Items answered by an error", ["error"], registry=own)
        self._rows = Counter("dspark_draft_feature_rows", "Feature rows received", registry=own)
        self._seconds = Histogram(
            "dspark_draft_seconds", "Time of a batch of proposals, by part", ["part"], buckets=_SECONDS, registry=own
        )
        self._running = Gauge("dspark_num_requests_running", "Sequences attached", registry=own)
        self._waiting = Gauge("dspark_num_requests_waiting", "Calls queued for the engine", registry=own)
        self._usage = Gauge("dspark_kv_cache_usage_perc", "Share of context room reserved, 1 is all", registry=own)
        self._sources = Gauge("dspark_draft_verifiers_connected", "Verify workers that send features", registry=own)

    def drafted(self, result: ProposeResult) -> None:
        """One engine batch is done."""
        served = [proposal for proposal in result.proposals if proposal.error is None]
        self._proposals.inc(len(served))
        self._tokens.inc(sum(len(proposal.tokens) for proposal in served))
        self._seconds.labels("forward").observe(result.forward_seconds)
        self._seconds.labels("total").observe(result.total_seconds)

    def answered(self, result: ProposeResult) -> None:
        """One call is answered."""
        self._seconds.labels("wait").observe(result.feature_wait_seconds)
        for proposal in result.proposals:
            if proposal.error is not None:
                self._refused.labels(type(proposal.error).__name__).inc()

    def missed(self, count: int) -> None:
        """Blocks were not drafted because their features had not come."""
        self._missed.inc(count)

    def received(self, rows: int) -> None:
        """Feature rows came in."""
        self._rows.inc(rows)

    def show(self, load: WorkerLoad, sources: int) -> None:
        """Present values of the gauges."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._usage.set(1.0 - load.free_pages / max(1, load.total_pages))
        self._sources.set(sources)
