"""What a draft worker offers a verify worker: its drafter's description and tap. Knows whether a target fits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dspark.errors import Mismatch
from dspark.messages import DrafterInfo, ModelInfo, TapInfo
from dspark.models.drafters import DSparkDrafter
from dspark.rpc.codec import encode
from dspark.rpc.pieces import split
from dspark.v1 import verifier_pb2 as pb

__all__ = ["TapOffer"]


@dataclass(frozen=True, slots=True)
class TapOffer:
    """A drafter and its tap: what a verify worker must fit, and the float32 bytes it is given."""

    drafter: DrafterInfo
    tap: TapInfo
    tensors: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, drafter: DSparkDrafter, path: Path) -> TapOffer:
        """A loaded drafter's; one without a name takes that of its directory."""
        info = drafter.info if drafter.info.name else replace(drafter.info, name=path.resolve().name)
        tensors = {name: tensor.numpy().tobytes() for name, tensor in drafter.tap_tensors().items()}
        return cls(info, drafter.tap, tensors)

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
        if self.tap.target_hidden_size != model.hidden_size:
            raise Mismatch(f"drafter reads hidden size {self.tap.target_hidden_size}, {theirs} has {model.hidden_size}")
        if max(self.tap.layer_ids) >= model.num_layers - 1:
            raise Mismatch(
                f"drafter reads layers {list(self.tap.layer_ids)}, "
                f"{theirs} offers -1 to {model.num_layers - 2} of its {model.num_layers}"
            )

    def fits(self, model: ModelInfo) -> bool:
        """Whether `check` passes."""
        try:
            self.check(model)
        except Mismatch:
            return False
        return True

    async def messages(self) -> AsyncIterator[pb.RegisterTapRequest]:
        """What registers the tap."""
        yield pb.RegisterTapRequest(info=encode(self.tap))
        for name, data in self.tensors.items():
            for piece in split(name, data):
                yield pb.RegisterTapRequest(piece=piece)
