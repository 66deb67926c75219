"""Running all layers of a model, again and again: what an implementation may remember from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["AtOnce", "Layers", "Repeated"]

Layers = Callable[[Tensor, Mapping[str, Any]], Sequence[Tensor]]
"""Inputs (rows, d) and what layers of each kind share (`dspark.models.layers.GroupStep`) -> outputs, rows first."""


class Repeated(Protocol):
    """Runs layers. One for each model, used from one thread. `remembers`: the first call of a kind takes longer."""

    remembers: bool

    def __call__(self, layers: Layers, x: Tensor, steps: Mapping[str, Any], key: Hashable) -> Sequence[Tensor]:
        """`layers(x, steps)`.

        Calls with one key and shapes run the same kernels over the same weights and pages: `layers` need not be called
        each time.
        """


class AtOnce:
    """Remembers nothing."""

    remembers = False

    def __call__(self, layers: Layers, x: Tensor, steps: Mapping[str, Any], key: Hashable) -> Sequence[Tensor]:  # noqa: ARG002 - the protocol's
        """As `Repeated`."""
        return layers(x, steps)
