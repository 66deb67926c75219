"""What an operator decides about a router, with the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.router.scheduling.policies import Adaptive, Policy

__all__ = ["Options", "Patience"]


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
class Options:
    """What an operator decides.

    Attributes:
        policy: how verify lengths are chosen for requests that name no policy themselves.
        verify_length: draft tokens verified a round and sequence at most, whatever the policy; 0 decodes plainly.
        explore: share of sequences whose whole block is verified to see what trimming hides, at most.
        seed: of what is drawn: whom to explore.
        trace: file that gets a line of JSON a round.
        prefill_tokens: prompt positions in a step beside running sequences.
        max_running: sequences of this router that one verify worker may have.
        step_seconds: after which a verify worker that has not answered is given up.
        worker_wait: seconds that a sequence waits while no worker could serve it.
        stall_seconds: after which a client that reads nothing is given up.
        patience: how long drafts are waited for.
    """

    policy: Policy = field(default_factory=Adaptive)
    verify_length: int = 16
    explore: float = 1 / 64
    seed: int = 0
    trace: Path | None = None
    prefill_tokens: int = 128
    max_running: int = 64
    step_seconds: float = 20.0
    worker_wait: float = 30.0
    stall_seconds: float = 120.0
    patience: Patience = field(default_factory=Patience)
