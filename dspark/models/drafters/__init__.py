"""Draft models: what proposes blocks of tokens for a target to verify."""

from dspark.models.drafters.checkpoint import load_drafter, save_drafter
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.dspark import DSparkDrafter

__all__ = ["DSparkDrafter", "DrafterConfig", "load_drafter", "save_drafter"]
