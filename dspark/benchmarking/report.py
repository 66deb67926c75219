"""A session as JSON: settings, machine, what is served, every cell, the summary."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import dspark
from dspark.benchmarking.plan import Plan
from dspark.benchmarking.session import Session
from dspark.benchmarking.summary import Matched, Row, matched, same_outputs, summarise
from dspark.errors import ConfigError
from dspark.events import ServerInfo

__all__ = ["baseline_of", "machine", "report", "served", "write_json"]

_PACKAGES = ("grpcio", "protobuf", "numpy", "torch", "triton")


def machine() -> dict[str, Any]:
    """Where the load comes from, which is where a cluster of one's own runs too."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": psutil.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "dspark": dspark.__version__,
        "packages": _versions(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def served(info: ServerInfo, workers: Mapping[str, int], *, prefix_cache: bool | None) -> dict[str, Any]:
    """What answers. `prefix_cache` is None where only whoever started the workers knows."""
    return {
        "model": asdict(info.model),
        "drafter": info.drafter,
        "verify_length": info.verify_length,
        "policy": info.policy,
        "version": info.version,
        "workers": dict(workers),
        "prefix_cache": prefix_cache,
    }


def baseline_of(plan: Plan) -> str:
    """What speeds at equal throughput are compared with: the shortest speculation where it is measured."""
    return "fixed:1" if "fixed:1" in plan.policies else plan.reference


def report(session: Session, **facts: Any) -> dict[str, Any]:
    """Everything as JSON has it; `facts` (machine, what is served) go first."""
    plan, rows = session.plan, summarise(session.measured, session.plan)
    compared, equal = same_outputs(session.measured, plan.reference) if plan.reproducible else (0, 0)
    return {
        **facts,
        "complete": session.complete,
        "settings": asdict(plan) | {"mode": plan.mode.value, "prompts": len(session.prompts)},
        "reference": plan.reference,
        "summary": [_summary(row) for row in rows],
        "matched": {
            "baseline": baseline_of(plan),
            "points": [_matched(point) for point in matched(rows, baseline_of(plan))],
        },
        "same_outputs": {"compared": compared, "equal": equal},
        "cells": [asdict(one.cell) | {"began": one.began} | asdict(one.figures) for one in session.measured],
    }


def _summary(row: Row) -> dict[str, Any]:
    ratios = {
        name: {"median": ratio.median, "low": ratio.low, "high": ratio.high, "values": ratio.values}
        for name, ratio in row.ratios.items()
    }
    counts = {"repeats": row.repeats, "requests": row.requests, "errors": row.errors}
    return {"concurrency": row.concurrency, "policy": row.policy} | counts | dict(row.medians) | {"ratios": ratios}


def _matched(point: Matched) -> dict[str, Any]:
    return {
        "concurrency": point.concurrency,
        "tokens_per_second": point.tokens_per_second,
        "speeds": dict(point.speeds),
        "relative": {policy: point.relative(policy) for policy in point.speeds},
    }


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Whole or not at all: whoever reads it while a run goes on finds the last complete state."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror or error}") from error
