"""Every error this project raises on purpose, and the one table that maps them to gRPC status codes.

::

    DSparkError
    ├── RequestError                 the caller's doing; the cluster is fine
    │   ├── InvalidRequest           a field is out of its limits
    │   ├── UnknownModel             another model is served here
    │   ├── Overloaded               the queue is full, or the caller is too fast: carries a retry hint
    │   ├── Cancelled                the caller went away or called Abort
    │   └── DeadlineExceeded         the caller's deadline passed
    ├── WorkerError                  between router and workers
    │   ├── UnknownSequence          not (or no longer) open on this worker
    │   ├── StaleMessage             epoch or committed length is not the sequence's present one
    │   ├── OutOfPages               the K/V pages it needs are not free
    │   ├── Mismatch                 drafter and target do not belong together
    │   ├── FeaturesMissing          the features a block needs did not come in time
    │   └── Unavailable              the worker is gone, or draining, or there is none
    ├── StartupError                 a process cannot start: one readable line, exit status 1
    │   ├── ConfigError
    │   ├── ModelFileError           missing, broken, or of unexpected shape
    │   └── StoreError               the store cannot be reached or started
    └── InternalError                a bug of ours

Errors carry everything in their message, so that it reads alike in a log line, a terminal and a status.
"""

from __future__ import annotations

import grpc

__all__ = [
    "Cancelled",
    "ConfigError",
    "DSparkError",
    "DeadlineExceeded",
    "FeaturesMissing",
    "InternalError",
    "InvalidRequest",
    "Mismatch",
    "ModelFileError",
    "OutOfPages",
    "Overloaded",
    "RequestError",
    "StaleMessage",
    "StartupError",
    "StoreError",
    "Unavailable",
    "UnknownModel",
    "UnknownSequence",
    "WorkerError",
    "from_status",
    "status_code",
]


class DSparkError(Exception):
    """Base of every error raised on purpose."""


class RequestError(DSparkError):
    """The caller's doing."""


class InvalidRequest(RequestError):
    """A field is out of its limits; the message names both."""


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class Overloaded(RequestError):
    """No room now; `retry_after` says in how many seconds to try again."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(RequestError):
    """The caller went away or aborted the request."""


class DeadlineExceeded(RequestError):
    """The caller's deadline passed."""


class WorkerError(DSparkError):
    """Something between router and workers."""


class UnknownSequence(WorkerError):
    """The sequence is not open on this worker."""


class StaleMessage(WorkerError):
    """The message's epoch or committed length is not the sequence's present one."""


class OutOfPages(WorkerError):
    """The K/V pages that the sequence needs are not free."""


class Mismatch(WorkerError):
    """Drafter and target, or two verifiers, do not belong together."""


class FeaturesMissing(WorkerError):
    """The target features that a block needs did not come in time."""


class Unavailable(WorkerError):
    """The worker is gone or draining, or none is there."""


class StartupError(DSparkError):
    """A process cannot start."""


class ConfigError(StartupError):
    """Settings contradict each other or name what is not there."""


class ModelFileError(StartupError):
    """A model file is missing, broken or of unexpected shape."""


class StoreError(StartupError):
    """The store cannot be reached or started."""


class InternalError(DSparkError):
    """A bug of ours."""


_STATUS: dict[type[DSparkError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Cancelled: grpc.StatusCode.CANCELLED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnknownSequence: grpc.StatusCode.NOT_FOUND,
    StaleMessage: grpc.StatusCode.ABORTED,
    OutOfPages: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Mismatch: grpc.StatusCode.FAILED_PRECONDITION,
    FeaturesMissing: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}

_REQUEST_ERRORS: dict[grpc.StatusCode, type[DSparkError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: Mismatch,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}

_WORKER_ERRORS: dict[grpc.StatusCode, type[DSparkError]] = {
    **_REQUEST_ERRORS,
    grpc.StatusCode.NOT_FOUND: UnknownSequence,
    grpc.StatusCode.ABORTED: StaleMessage,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfPages,
}


def status_code(error: BaseException) -> grpc.StatusCode:
    """The gRPC status of an error: of the nearest ancestor in the table, INTERNAL for what is not ours."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return grpc.StatusCode.INTERNAL


def from_status(code: grpc.StatusCode, message: str, *, worker: bool = False) -> DSparkError:
    """The error behind a status: as a client sees it, or (`worker`) as a router sees it from a worker."""
    table = _WORKER_ERRORS if worker else _REQUEST_ERRORS
    return table.get(code, InternalError)(message)
