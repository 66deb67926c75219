"""The models that verify workers serve, each with its tokenizer, fetched once."""

from __future__ import annotations

import asyncio

import structlog

from dspark.errors import InvalidRequest, ModelFileError, Unavailable, UnknownModel
from dspark.tokenizer import Tokenizer
from services.router.links import VerifierLink
from services.router.requests import ServedModel

__all__ = ["Catalog"]

_log = structlog.get_logger(__name__)


class Catalog:
    """Models by fingerprint. One that was served once stays known: its requests wait for a worker to come back."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._learning: dict[str, asyncio.Lock] = {}
        self._known = asyncio.Event()

    async def learn(self, link: VerifierLink) -> None:
        """Makes a worker's model known. `ModelFileError` where its tokenizer cannot be read."""
        fingerprint = link.model.model_fingerprint
        async with self._learning.setdefault(fingerprint, asyncio.Lock()):
            if fingerprint in self._models:
                return
            files = await link.fetch_tokenizer()
            if "tokenizer.json" not in files:
                raise ModelFileError(f"{link.worker_id} sent no tokenizer.json")
            facts = files.get("model.json", b"{}")
            tokenizer = await asyncio.to_thread(Tokenizer, files["tokenizer.json"], facts)
            self._models[fingerprint] = ServedModel(link.model, tokenizer)
        self._known.set()
        _log.info("model known", model=link.model.name, model_fingerprint=fingerprint)

    def models(self) -> tuple[ServedModel, ...]:
        """What is known now."""
        return tuple(self._models.values())

    async def resolve(self, name: str, *, wait: float) -> ServedModel:
        """The model of that name or fingerprint; the only one for an empty name.

        While none is known at all, waits up to `wait` seconds, then raises `Unavailable`. `UnknownModel` where others
        are served, `InvalidRequest` where an empty name could mean several.
        """
        try:
            async with asyncio.timeout(wait):
                await self._known.wait()
        except TimeoutError as error:
            raise Unavailable(f"no verify worker has come within {wait:g} s, so no model is served") from error
        served = ", ".join(repr(model.info.name) for model in self._models.values())
        if not name and len(self._models) > 1:
            raise InvalidRequest(f"model is empty, and there are several: {served}")
        for model in self._models.values():
            if name in {"", model.info.name, model.info.model_fingerprint}:
                return model
        raise UnknownModel(f"model {name!r} is not served here; there is {served}")
