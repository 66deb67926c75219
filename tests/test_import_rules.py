"""The layers of the code: who may import whom. Reads every import statement, lazy ones included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {  # package -> what nothing below it may import
    "dspark": {"services", "training", "benchmarks"},
    "dspark.costs": {"torch", "triton", "dspark.models"},
    "services.router": {"torch", "triton", "services.draft", "services.verifier", "services.pair", "training"},
    "services.draft": {"services.router", "services.verifier", "services.pair", "training"},
    "services.verifier": {"services.router", "services.draft", "services.pair", "training"},
    "services.pair": {"services.router", "training"},
}
EXEMPT = "dspark.cli"  # its commands start services and training, inside functions


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_module_imports_past_its_layer(package: str) -> None:
    files = [p for p in modules(package) if not within(module_name(p), EXEMPT)]
    assert len(files) > 3
    broken = [
        f"{module_name(path)} imports {name}"
        for path in files
        for name in imports(path)
        if any(within(name, bad) for bad in FORBIDDEN[package])
    ]
    assert not broken


@pytest.mark.parametrize(
    "module", ["services.router.service", "services.router.__main__", "dspark.client", "dspark.cli", "dspark.costs"]
)
def test_router_and_client_load_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
