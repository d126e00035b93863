"""Shards by a Ray cluster: each is a task, done again where its process or its machine goes away.

A task takes one CPU and computes with one thread. It needs no actor: Ray starts a lost task wherever there is room, and
its processes stay between tasks and keep the model open. Machines read all paths themselves.
"""

import os
import platform
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from hflow_rt import __version__
from hflow_rt.assets import is_installed
from hflow_rt.data.image_source import ImageSource
from hflow_rt.data.sources import open_source
from hflow_rt.errors import BackendUnavailable, DataError, HFlowError
from hflow_rt.extras import needed
from hflow_rt.runtime.session import Session, load
from hflow_rt.runtime.shards import Job, is_done, listed, read_job, work

__all__ = ["Opening", "here", "in_tasks"]

RETRIES = 5  # of a task that was lost: machines go now and then, but what always ends its process must come to an end
SECONDS = 5.0  # for what Ray itself gives a minute or more
_IMPATIENT = {  # it would try for ten minutes, say after `auto` found what is left of a cluster that has ended
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "2",
    "RAY_py_gcs_connect_timeout_s": "5",
}
ROUNDS = 30  # a second each, for shards that a process of a lost machine, or of a killed driver, still holds


class Opening(NamedTuple):
    """What a machine opens, by paths that all of them see."""

    out: str
    model: str  # or the name of a bundled one, which each machine has
    backend: str
    device: str
    source: str | None

    @classmethod
    def of(cls, out: Path, session: Session, backend: str, device: str, source: Path | None) -> "Opening":
        """What makes others do as `session`, which `load` opened by `backend` and `device`."""
        path = session.bundle.path
        model = path.name if is_installed(path) else os.path.abspath(path)
        return cls(os.path.abspath(out), model, backend, device, None if source is None else os.path.abspath(source))


def in_tasks(
    address: str, opening: Opening, job: Job, shards: Sequence[int], told: Callable[[str], None]
) -> Generator[int, None, None]:
    """Do `shards` on the cluster at `address`, as `ray.init` takes it; yields each that is done.

    told: hears what the cluster is, and which shards somebody else is at. What is not done when this is closed is
    cancelled. Raises `BackendUnavailable` where there is no cluster, where it is of another version and where a shard
    was lost too often, and what a task raises.
    """
    with _connected(address) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
        told(f"Ray at {address}: {len(nodes)} machines, {cpus:.0f} CPUs")
        _spare(ray, nodes)
        gpus = int("cpu" not in job.backend.lower())
        if gpus and not any(node["Resources"].get("GPU") for node in nodes):
            raise BackendUnavailable(
                f"{job.backend} needs a GPU, and no machine at {address} has one; use a CPU backend"
            )
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD")(_travelling())
        left, lost = list(shards), list[int]()
        for _ in range(ROUNDS):
            held = list[int]()
            for shard, found in _results(ray, task, (__version__, tuple(opening), job.model_dump_json()), left):
                if found:
                    yield shard
                else:
                    (lost if found is None else held).append(shard)
            left = held
            if not left:
                break
            time.sleep(1)
    for shard in left:
        told(f"somebody else is at shard {shard}")
    if lost:
        raise BackendUnavailable(
            f"shard {lost[0]}{f' and {len(lost) - 1} others' if lost[1:] else ''} ended {RETRIES + 1} processes;"
            " see the logs of Ray, and run this again to do what is left"
        )


def here(opening: Opening, job: Job, shard: int) -> bool:
    """Do a shard in this process, which keeps open what it opens; whether it is done now. Raises `HFlowError`."""
    try:
        session, source, _ = _opened(opening, job.model_dump_json())
        out = Path(opening.out)
        return work(session, out, job, shard, source) or is_done(out, job, shard)
    except HFlowError as error:
        raise type(error)(f"{error} (on {platform.node()})") from error


@lru_cache(maxsize=1)
def _opened(opening: Opening, plan: str) -> tuple[Session, ImageSource | None, ExitStack]:
    """The model and the images of a job, if they are those that it is of, and what keeps these open.

    Raises `HFlowError`.
    """
    kept, out, job = ExitStack(), Path(opening.out), Job.model_validate_json(plan)
    try:
        seen = read_job(out)
    except DataError:
        seen = None
    if seen != job:
        raise DataError(f"{out} must be one folder that every machine sees, and is another; name one on a shared disk")
    os.environ["OMP_NUM_THREADS"] = "1"
    session = load(opening.model, opening.backend, opening.device)
    if (steps := job.settings.get("steps")) is not None:
        session = session.in_steps(steps)
    session = session.with_controls(job.settings.get("controls", {}))
    found = (session.manifest.identity(session.engines), session.backend)
    if found != (job.model, job.backend):
        raise DataError(
            f"the job is of model {job.model[:12]} on {job.backend}, and here is {found[0][:12]} on {found[1]}"
        )
    if opening.source is None:
        return session, None, kept
    source = kept.enter_context(open_source(opening.source))  # for all shards of this process
    if listed(source) != job.inputs:
        raise DataError(f"{opening.source} must hold the same images on every machine, and holds others")
    return session, source, kept


def _travelling() -> Callable[..., bool | str]:
    """The task. It travels as code, so that a machine without this version says so instead of failing to import it."""

    def task(version: str, opening: tuple[Any, ...], plan: str, shard: int) -> bool | str:
        import platform

        try:
            from hflow_rt import __version__ as found
        except ImportError:
            found = "none"
        if found != version:
            return f"{platform.node()} must have hflow-rt {version}, and has {found}; install the same everywhere"
        from hflow_rt.runtime.ray_jobs import Opening, here
        from hflow_rt.runtime.shards import Job

        return here(Opening(*opening), Job.model_validate_json(plan), shard)

    return task


def _results(ray: Any, task: Any, beside: tuple[Any, ...], shards: Sequence[int]) -> Iterator[tuple[int, bool | None]]:
    """Each shard as it ends, and whether it is done; None where Ray gave it up."""
    running = {task.remote(*beside, shard): shard for shard in shards}
    try:
        while running:
            # all that end within a second together: asking for each of many thousands would take longer than they do
            for reference in ray.wait([*running], num_returns=len(running), timeout=1)[0]:
                shard = running.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError:
                    found = None
                if isinstance(found, str):
                    raise BackendUnavailable(found)
                yield shard, found
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:  # those at work remove what they have begun
            ray.wait([*running], num_returns=len(running), timeout=2 * SECONDS)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module, connected. Raises `BackendUnavailable` in seconds, `DataError` for what is no address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here tells nobody of it
    if address != "local":
        os.environ |= {name: os.environ.get(name, value) for name, value in _IMPATIENT.items()}
    with needed("ray", "--ray needs Ray: pip install 'hflow-rt[ray]'"):
        ray: Any = import_module("ray")
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdecimal()):
            raise DataError(f"--ray takes auto, local, HOST:PORT or ray://HOST:PORT; found '{address}'")
        try:
            socket.create_connection((host, int(port)), SECONDS).close()
        except OSError as error:
            raise BackendUnavailable(f"nobody answers at {address} ({error}); see 'ray status' there") from error
    alone = {"include_dashboard": False, "object_store_memory": 2**27} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **alone)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise BackendUnavailable(f"Ray at {address} cannot be used: {' '.join(str(error).split())}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _spare(ray: Any, nodes: Sequence[dict[str, Any]]) -> None:
    """Take a CPU of each machine that has more than two, for as long as this is connected: for what else runs there."""
    for node in nodes:
        if node["Resources"].get("CPU", 0) > 2:
            name = f"node:{node['NodeManagerAddress']}"  # a resource that Ray gives each machine to choose it by
            ray.util.placement_group([{"CPU": 1, name: 0.001}]).wait(SECONDS)  # else tasks would take it first
