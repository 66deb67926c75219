"""A whole cluster on one machine: the processes of its store, router, draft and verify workers.

::

    async with Cluster("gemma-3-270m") as cluster, cluster.client() as client:
        print((await client.complete("The capital of France is")).text)
        await cluster.add_draft()                  # a second draft worker takes new work within seconds
        await cluster.stop("draft-1")              # the first drains and ends

Everything ends with the block, with Ctrl-C, and when this process dies. Torch-free: only the workers load models.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import dspark
from dspark.client import Client
from dspark.errors import ConfigError, StartupError, Unavailable
from dspark.processes import Child, spawn
from dspark.rpc.probe import serving
from dspark.sharing import disagreement, shares_cores
from dspark.store import Directory, EmbeddedStore, Role, check_store

__all__ = ["DEFAULT_MODEL", "Cluster", "find_drafter"]

DEFAULT_MODEL = "gemma-3-270m"

_POLL_SECONDS = 0.05


def find_drafter(drafter: str | Path, model: str | Path) -> Path | None:
    """What `drafter` means to a draft worker: a checkpoint directory, or "ngram" for prompt lookup.

    "default" is the checkpoint that comes with the model. None for "none", and where no drafter comes with the model.
    `ConfigError` where a path has no config.json.
    """
    if str(drafter) == "none":
        return None
    if str(drafter) == "ngram":
        return Path("ngram")
    if str(drafter) == "default":
        name = f"{Path(model).name}-dspark"
        place = Path(dspark.__file__).parent.parent / "checkpoints" / name
        return place if (place / "config.json").is_file() else None
    if not (Path(drafter) / "config.json").is_file():
        raise ConfigError(
            f"drafter {str(drafter)!r} is no directory with a config.json, nor 'default', 'ngram' or 'none'"
        )
    return Path(drafter)


class Cluster:
    """A cluster for `async with`; leaving the block stops it.

    Args:
        model: a name that `dspark models` knows, or a directory or GGUF file.
        drafter: a checkpoint directory; "default": the one that comes with the model, if any; "ngram": prompt lookup;
            "none": plain decoding.
        draft: draft workers to start with; verify: verify workers.
        together: the first draft and the first verify worker are one process, which saves what lies between them where
            both share the cores; whatever ends one, as `stop`, ends both. None: where one of each starts, on a machine
            without a GPU, and no option is given to one of them that both have.
        store: URL of a running store; None starts one of our own.
        listen: where the router listens; port 0 picks a free one, see `address`.
        policy: how verify lengths are chosen, as the router's --policy; None: its default.
        verify_length: draft tokens verified a round at most; None: the router's default.
        log_dir: where each process's log goes; None: a temporary directory, kept if the start fails.
        router_args, draft_args, verify_args: further command-line arguments of the programs.
        start_seconds: how long the start may take.

    Raises on entering:
        StartupError: a process ended or was not ready in time; the message has its last line and exit status.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        drafter: str | Path = "default",
        *,
        draft: int = 1,
        verify: int = 1,
        together: bool | None = False,
        store: str | None = None,
        listen: str = "127.0.0.1:0",
        policy: str | None = None,
        verify_length: int | None = None,
        log_dir: Path | None = None,
        router_args: Sequence[str] = (),
        draft_args: Sequence[str] = (),
        verify_args: Sequence[str] = (),
        start_seconds: float = 300.0,
    ) -> None:
        self._model = model
        self._drafter = drafter
        self._counts: dict[Role, int] = {"verify": verify, "draft": draft}
        self._together = together
        self._listen = listen
        self._store = store
        self._policy = policy
        self._length_args = () if verify_length is None else ("--verify-length", str(verify_length))
        self._log_dir = log_dir
        self._router_args = router_args
        self._worker_args: dict[Role, Sequence[str]] = {"draft": draft_args, "verify": verify_args}
        self._start_seconds = start_seconds
        self._numbers = {"draft": itertools.count(1), "verify": itertools.count(1)}
        self._children: dict[str, Child] = {}
        self._drafter_path: Path | None = None
        self.store_url = ""
        self.address = ""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._resolve()
            self._make_log_dir(stack)
            self.store_url = await self._open_store(stack)
            self._directory = await stack.enter_async_context(Directory(self.store_url))
            stack.push_async_callback(self._stop_all)
            await self._start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers that run: `draft-1`, `verify-1`, …; also their ids in the store."""
        return tuple(name for name, child in self._children.items() if name != "router" and child.returncode is None)

    @property
    def drafter(self) -> Path | None:
        """The drafter's directory, or "ngram"; None: plain decoding."""
        return self._drafter_path

    @property
    def log_dir(self) -> Path:
        """Where each process's log is, as `<name>.log`."""
        return self._logs

    def client(self) -> Client:
        """A client of this cluster's router."""
        return Client(self.address)

    async def add_draft(self, *args: str) -> str:
        """Starts another draft worker, waits until it is ready and returns its name. `args` go to the program."""
        return await self._add("draft", args)

    async def add_verify(self, *args: str) -> str:
        """Starts another verify worker, waits until it is ready and returns its name. `args` go to the program."""
        return await self._add("verify", args)

    async def stop(self, worker: str, number: int = signal.SIGTERM, *, patience: float = 60.0) -> int:
        """Sends a worker a signal and returns its exit status; SIGTERM lets it drain. Killed after `patience` s."""
        child = self._children.get(worker)
        if child is None:
            raise ConfigError(f"no worker {worker!r} here, only {', '.join(self._children) or 'none'}")
        return await child.stop(number, patience=patience)

    def pid(self, name: str) -> int:
        """Process id of "router" or of a worker."""
        return self._children[name].pid

    async def watch(self, lost: Callable[[str], None] = lambda _: None) -> None:
        """Tells `lost` of every worker that ends; raises `Unavailable` when the router has ended."""
        waiting = {asyncio.create_task(child.process.wait()): child for child in set(self._children.values())}
        try:
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for child in [waiting.pop(task) for task in done]:
                    if child.name == "router":
                        raise Unavailable(_ending(child))
                    lost(f"{_ending(child)} (log: {child.log_path})")
        finally:
            for task in waiting:
                task.cancel()

    # ------------------------------------------------------------ starting

    def _resolve(self) -> None:
        from dspark.models.pull import resolve_model  # noqa: PLC0415 - a cluster's client side needs no models

        self._model_path = resolve_model(str(self._model))
        self._drafter_path = find_drafter(self._drafter, self._model)
        if self._drafter_path is None:
            self._counts["draft"] = 0

    def _make_log_dir(self, stack: AsyncExitStack) -> None:
        if self._log_dir is not None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            self._logs = self._log_dir
            return
        self._logs = Path(tempfile.mkdtemp(prefix="dspark-logs-"))
        stack.push(self._drop_logs)

    def _drop_logs(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, StartupError):
            shutil.rmtree(self._logs, ignore_errors=True)

    async def _open_store(self, stack: AsyncExitStack) -> str:
        if self._store is None:
            return await stack.enter_async_context(EmbeddedStore(log_path=self._logs / "store.log"))
        await asyncio.to_thread(check_store, self._store)
        return self._store

    async def _start(self) -> None:
        router = ["services.router", "--listen", self._listen, *self._rule_args(), *self._router_args]
        self._children["router"] = await self._spawn("router", router)
        paired = self._paired()
        names = await self._spawn_pair() if paired else []
        apart = [role for role, count in self._counts.items() for _ in range(count - paired)]
        names += [await self._spawn_worker(role) for role in apart]
        async with asyncio.timeout(self._start_seconds) as limit:
            try:
                self.address = await self._wait_for_router()
                await self._wait_for_workers(names)
            except asyncio.CancelledError:
                if limit.expired():
                    raise StartupError(self._late()) from None
                raise

    def _paired(self) -> bool:
        """Whether the first workers share a process."""
        options = disagreement(self._worker_args["draft"], self._worker_args["verify"])
        if self._together is None:
            return set(self._counts.values()) == {1} and shares_cores() and not options
        if self._together and not all(self._counts.values()):
            raise ConfigError("together: there is no draft worker or no verify worker that could share a process")
        if self._together and options:
            raise ConfigError(f"together: {', '.join(options)} has to be the same for both")
        return self._together

    def _rule_args(self) -> list[str]:
        """A cluster that will never have a drafter decodes plainly, which needs no costs."""
        policy = self._policy or ("none" if self._drafter_path is None else None)
        return [*(() if policy is None else ("--policy", policy)), *self._length_args]

    def _late(self) -> str:
        heard = "; ".join(f"{name}: {child.last_line()}" for name, child in self._children.items())
        return f"the cluster was not ready within {self._start_seconds:g} s ({heard}; logs in {self._logs})"

    async def _add(self, role: Role, args: Sequence[str]) -> str:
        if role == "draft" and self._drafter_path is None:
            raise ConfigError("this cluster has no drafter, so it can have no draft worker")
        name = await self._spawn_worker(role, args)
        async with asyncio.timeout(self._start_seconds):
            await self._wait_for_workers([name])
        return name

    async def _spawn_pair(self) -> list[str]:
        """A verify and a draft worker in one process; their names."""
        names = [f"{role}-{next(self._numbers[role])}" for role in self._counts]
        models = ["--model", str(self._model_path), "--drafter", str(self._drafter_path)]
        ids = ["--worker-id", names[0], "--draft-worker-id", names[1]]
        args = [*self._worker_args["verify"], *self._worker_args["draft"]]
        child = await self._spawn("pair-1", ["services.pair", *models, *ids, *args])
        self._children |= dict.fromkeys(names, child)
        return names

    async def _spawn_worker(self, role: Role, args: Sequence[str] = ()) -> str:
        name = f"{role}-{next(self._numbers[role])}"
        models = ["--model", str(self._model_path)]
        if role == "draft":
            models = ["--drafter", str(self._drafter_path), "--target", str(self._model_path)]
        elif self._drafter_path is None:
            models += ["--profile", "off"]
        program = "services.draft" if role == "draft" else "services.verifier"
        command = [program, *models, "--worker-id", name, *self._worker_args[role], *args]
        self._children[name] = await self._spawn(name, command)
        return name

    async def _spawn(self, name: str, command: Sequence[str]) -> Child:
        module, *args = command
        line = [sys.executable, "-m", module, "--store", self.store_url, *args]
        return await spawn(name, line, log_path=self._logs / f"{name}.log")

    async def _wait_for_workers(self, names: Sequence[str]) -> None:
        await self._wait_for_records(names)
        await self._wait_until_known(names)

    async def _wait_for_records(self, names: Sequence[str]) -> None:
        while True:
            self._check_alive(["router", *names])
            if set(names) <= {record.worker_id for record in self._directory.workers()}:
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def _wait_until_known(self, names: Sequence[str]) -> None:
        """A worker is in the store a moment before the router has seen it there."""
        async with self.client() as client:
            while not set(names) <= {worker.worker_id for worker in (await client.loads()).workers}:
                self._check_alive(["router", *names])
                await asyncio.sleep(_POLL_SECONDS)

    async def _wait_for_router(self) -> str:
        address = ""
        while True:
            self._check_alive(self._children)
            ready = (line for line in self._children["router"].json_lines() if line.get("event") == "ready")
            address = address or next((str(line["address"]) for line in ready), "")
            if address and await serving(address):
                return address
            await asyncio.sleep(_POLL_SECONDS)

    def _check_alive(self, names: Sequence[str] | dict[str, Child]) -> None:
        for name in names:
            child = self._children[name]
            if child.returncode is not None:
                raise StartupError(f"{_ending(child)} (log: {child.log_path})")

    async def _stop_all(self) -> None:
        """Router first, so that it does not take its workers' leaving for their loss."""
        if (router := self._children.get("router")) is not None:
            await router.stop(signal.SIGTERM, patience=3.0)
        workers = {child for name, child in self._children.items() if name != "router"}
        await asyncio.gather(*(child.stop(signal.SIGTERM, patience=3.0) for child in workers))


def _ending(child: Child) -> str:
    status = child.returncode or 0
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return f"{child.name} {how}: {child.last_line() or 'it said nothing'}"
