"""The committed stubs are what the committed protocol generates."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_stubs_are_those_of_the_protocol(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy")]
    plugin = f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}"
    command = [sys.executable, "-m", "grpc_tools.protoc", plugin, "-Iproto", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True)
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    kept = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "dspark/v1").glob("*_pb2*.py*")}
    assert len(made) == 3 * len(protos)
    assert made == kept, "run `make proto`"
