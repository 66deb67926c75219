"""Whether a draft and a verify worker of one machine may be one process: where they run, and what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["OWN_OPTIONS", "disagreement", "shares_cores"]

OWN_OPTIONS = frozenset(
    [
        "--context-positions",
        "--connect-seconds",
        "--draft-top-k",
        "--draft-weights",
        "--lookup",
        "--no-lookup",
        "--feature-queue-mib",
        "--max-step-tokens",
        "--noise-candidates",
        "--page-size",
        "--pages",
        "--prefix-cache",
        "--no-prefix-cache",
        "--weights",
    ]
)
"""Options that only one kind of worker has."""


def shares_cores() -> bool:
    """Whether both would compute on the same cores, for want of a card."""
    return not Path("/dev/nvidiactl").exists()


def disagreement(draft: Sequence[str], verify: Sequence[str]) -> list[str]:
    """Options that one process cannot have as these command lines have them."""
    one, other = _options(draft), _options(verify)
    shared = (one.keys() | other.keys()) - OWN_OPTIONS
    return sorted(name for name in shared if one.get(name) != other.get(name))


def _options(args: Sequence[str]) -> dict[str, str]:
    """Command-line arguments by name; of a flag without a value, the empty string."""
    options, name = {}, ""
    for arg in args:
        if arg.startswith("--"):
            name, _, options[name] = arg.partition("=")
        else:
            options[name] = arg
    return options
