"""What the integration tests' fixtures give: makes clusters of the tiny pair."""

from collections.abc import Callable

from dspark.cluster import Cluster

ClusterOf = Callable[..., Cluster]
