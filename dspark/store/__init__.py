"""The store: which workers there are and how they do. Redis protocol; records expire by themselves."""

from __future__ import annotations

from dspark.store.directory import Directory, Reading
from dspark.store.embedded import EmbeddedStore
from dspark.store.heartbeat import Heartbeat
from dspark.store.records import Role, WorkerRecord, check_store
from dspark.store.usage import Usage, cpu_usage, gpu_usage

__all__ = [
    "Directory",
    "EmbeddedStore",
    "Heartbeat",
    "Reading",
    "Role",
    "Usage",
    "WorkerRecord",
    "check_store",
    "cpu_usage",
    "gpu_usage",
]
