"""A server in a thread of the tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hflow_rt.runtime.explore.description import described
from hflow_rt.runtime.explore.server import listen, server_of
from hflow_rt.runtime.session import Session


@contextmanager
def running(session: Session, port: int | None = None, token: str | None = None) -> Iterator[int]:
    """Where it answers."""
    listening = listen(None, port, 0)
    found = listening.getsockname()[1]
    server = server_of(session, described(session), listening, token)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield int(found)
    server.should_exit = True
    thread.join(10)
    listening.close()
