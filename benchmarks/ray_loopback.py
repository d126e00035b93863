"""Two machines of a Ray cluster, both on the loopback address of this one, for proofs that end some of it by force."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

STORE = 80 * 2**20  # bytes a machine, about the least that Ray takes


class Loopback:
    """A head, which stays, and a second machine, which may be lost; of `cpus` each. To be made `on_loopback`."""

    def __init__(self, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._cpus = {"num_cpus": cpus, "object_store_memory": STORE, "include_log_monitor": False}
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={**self._cpus, "include_dashboard": False, "no_monitor": True}
        )
        self.address = str(self._cluster.address)
        self._second = self._cluster.add_node(**self._cpus)

    def workers(self) -> list[psutil.Process]:
        """The processes that are at a task, on either machine."""
        found = []
        for node in (self._cluster.head_node, self._second):
            with suppress(psutil.Error):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found += [child for child in raylet.children() if child.cmdline()[:1] == ["ray::task"]]
        return found

    def lose_machine(self) -> None:
        """SIGKILL for what Ray runs on the second; its workers have to notice that. Then another one joins."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(**self._cpus)

    def close(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


@contextmanager
def on_loopback() -> Iterator[None]:
    """The environment in which Ray must be imported to keep to 127.0.0.1, behind a token; its files are removed."""
    folder, before = tempfile.mkdtemp(prefix="hr", dir="/tmp"), dict(os.environ)  # short: names of sockets are limited
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps Ray to 127.0.0.1
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)
