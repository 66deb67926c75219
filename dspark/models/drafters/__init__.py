"""Draft models: what proposes blocks of tokens for a target to verify."""

from dspark.models.drafters.base import Drafter
from dspark.models.drafters.chain import ChainDrafter
from dspark.models.drafters.checkpoint import CLASSES, load_drafter, save_drafter
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.dspark import DFlashDrafter, DSparkDrafter, ParallelDrafter
from dspark.models.drafters.hints import Hints

__all__ = [
    "CLASSES",
    "ChainDrafter",
    "DFlashDrafter",
    "DSparkDrafter",
    "Drafter",
    "DrafterConfig",
    "Hints",
    "ParallelDrafter",
    "load_drafter",
    "save_drafter",
]
