"""What a draft worker offers a verify worker: its drafter's description, and its tap if it reads hidden states.

Knows whether a target fits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dspark.errors import Mismatch
from dspark.messages import DrafterInfo, ModelInfo, TapInfo
from dspark.models.drafters import Drafter
from dspark.rpc.codec import encode
from dspark.rpc.pieces import split
from dspark.v1 import verifier_pb2 as pb
from services.draft.ngram import PromptLookup

__all__ = ["TapOffer"]


@dataclass(frozen=True, slots=True)
class TapOffer:
    """A drafter and its tap: what a verify worker must fit, and the float32 bytes it is given.

    Without a tap, `drafter.tap_id` is empty: token ids are all that the drafter reads.
    """

    drafter: DrafterInfo
    tap: TapInfo | None = None
    tensors: Mapping[str, bytes] = field(repr=False, default_factory=dict)

    @classmethod
    def of(cls, drafter: Drafter | PromptLookup, path: Path) -> TapOffer:
        """A loaded drafter's; one without a name takes that of its directory."""
        if isinstance(drafter, PromptLookup):
            return cls(drafter.info)
        info = drafter.info if drafter.info.name else replace(drafter.info, name=path.resolve().name)
        tensors = {name: tensor.numpy().tobytes() for name, tensor in drafter.tap_tensors().items()}
        return cls(info, drafter.tap, tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's features."""
        return 2 * self.tap.feature_size if self.tap is not None else 0

    def check(self, model: ModelInfo) -> None:
        """`Mismatch`, naming both values, unless this drafter belongs to that target."""
        theirs = f"target {model.name!r}"
        wanted = self.drafter.model_fingerprint
        if wanted and wanted != model.model_fingerprint:
            raise Mismatch(
                f"drafter {self.drafter.name!r} is for the target with fingerprint {wanted}, "
                f"{theirs} has {model.model_fingerprint}"
            )
        if self.drafter.vocab_size != model.vocab_size:
            raise Mismatch(f"drafter vocabulary {self.drafter.vocab_size}, {theirs} has {model.vocab_size}")
        if self.tap is not None:
            _check_tap(self.tap, model, theirs)

    def fits(self, model: ModelInfo) -> bool:
        """Whether `check` passes."""
        try:
            self.check(model)
        except Mismatch:
            return False
        return True

    async def messages(self) -> AsyncIterator[pb.RegisterTapRequest]:
        """What registers the tap, where there is one."""
        yield pb.RegisterTapRequest(info=encode(self.tap))
        for name, data in self.tensors.items():
            for piece in split(name, data):
                yield pb.RegisterTapRequest(piece=piece)


def _check_tap(tap: TapInfo, model: ModelInfo, theirs: str) -> None:
    if tap.target_hidden_size != model.hidden_size:
        raise Mismatch(f"drafter reads hidden size {tap.target_hidden_size}, {theirs} has {model.hidden_size}")
    if max(tap.layer_ids) >= model.num_layers - 1:
        raise Mismatch(
            f"drafter reads layers {list(tap.layer_ids)}, "
            f"{theirs} offers -1 to {model.num_layers - 2} of its {model.num_layers}"
        )
