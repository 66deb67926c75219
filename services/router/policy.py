"""What an operator decides about a router, with the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Patience", "Policy"]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long drafts are waited for, in seconds.

    Attributes:
        features: that a worker may let a block wait for its features.
        round: that a round waits for proposals.
        worker: after which a worker that has not answered is given up.
    """

    features: float = 0.2
    round: float = 0.5
    worker: float = 10.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator decides.

    Attributes:
        verify_length: draft tokens verified a round and sequence; 0 decodes plainly.
        prefill_tokens: prompt positions in a step beside running sequences.
        max_running: sequences of this router that one verify worker may have.
        step_seconds: after which a verify worker that has not answered is given up.
        worker_wait: seconds that a sequence waits while no worker could serve it.
        stall_seconds: after which a client that reads nothing is given up.
        patience: how long drafts are waited for.
    """

    verify_length: int = 5
    prefill_tokens: int = 128
    max_running: int = 64
    step_seconds: float = 20.0
    worker_wait: float = 30.0
    stall_seconds: float = 120.0
    patience: Patience = field(default_factory=Patience)
