"""What is logged and counted of a request's life: accepted, first token, moved, finished or ended early."""

from __future__ import annotations

import structlog

from dspark.errors import DSparkError
from services.router.finish import FinishReason
from services.router.metrics import Metrics
from services.router.sequences import Sequence

__all__ = ["Chronicle"]

_log = structlog.get_logger(__name__)


class Chronicle:
    """Of one router. Every line has the request's id."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def accepted(self, sequence: Sequence) -> None:
        """It waits in the queue."""
        request = sequence.request
        self._metrics.prompt_tokens.inc(len(request.prompt))
        _log.info(
            "accepted",
            request_id=request.request_id,
            sequence_id=sequence.sequence_id,
            prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
            mode=request.sampling.mode.value,
            temperature=request.sampling.temperature,
        )

    def first_token(self, sequence: Sequence) -> None:
        """Its first token is on the way to its client."""
        self._metrics.first_token.observe(sequence.first_token_seconds)
        self._metrics.queue_time.observe(sequence.queue_seconds)
        _log.info(
            "first token",
            request_id=sequence.request.request_id,
            seconds=round(sequence.first_token_seconds, 4),
            queue_seconds=round(sequence.queue_seconds, 4),
            cached_tokens=sequence.cached_tokens,
        )

    def reopening(self, sequence: Sequence, error: DSparkError) -> None:
        """Its worker does not go on with it."""
        _log.warning("reopening", request_id=sequence.request.request_id, epoch=sequence.epoch, reason=str(error))

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """Its client has everything."""
        _log.info("finished", request_id=sequence.request.request_id, finish_reason=reason.value, **sequence.story())

    def ended_early(self, sequence: Sequence, error: DSparkError) -> None:
        """It ended before it was complete."""
        self._metrics.ended.labels(type(error).__name__).inc()
        _log.info("ended early", request_id=sequence.request.request_id, reason=str(error), **sequence.story())
