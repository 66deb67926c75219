"""What a step costs: measured at start, kept in files and the store, corrected by the steps that really run.

Without torch: workers measure and correct, routers predict.
"""

from __future__ import annotations

from dspark.costs.model import CostModel
from dspark.costs.profile import CostProfile, Kind, Point
from dspark.costs.refined import Refined

__all__ = ["CostModel", "CostProfile", "Kind", "Point", "Refined"]
