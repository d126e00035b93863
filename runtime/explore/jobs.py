"""One thread that works through what the page asks for, latest first forgotten: a model runs one call at a time."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Busy", "Jobs", "Superseded"]

T = TypeVar("T")
_WAITING = 64


class Busy(Exception):  # noqa: N818 - a state, not a fault
    """So many wait already that another must come back later."""


class Superseded(Exception):  # noqa: N818 - a state, not a fault
    """Who asked has asked for something else since."""


class _Job:
    def __init__(self, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work, self.loop = work, loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.begun = self.dropped = False

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Tell who waits, from any thread."""

        def tell() -> None:
            if not self.future.done():
                if error is None:
                    self.future.set_result(result)
                else:
                    self.future.set_exception(error)

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(tell)


class Jobs:
    """A queue with a limit and the thread that empties it, which does not keep the process from ending."""

    def __init__(self, waiting: int = _WAITING) -> None:
        self._queue: queue.Queue[_Job] = queue.Queue(waiting)
        self._latest: dict[str, _Job] = {}
        threading.Thread(target=self._run, name="explore", daemon=True).start()

    async def run(self, work: Callable[[], T], who: str | None = None) -> T:
        """The result of `work`, in its turn. Raises what it raises, and `Busy`.

        who: asks for one thing at a time: what it asked for before and has not begun is given up as `Superseded`.
        """
        job = _Job(work, asyncio.get_running_loop())
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Busy from None
        if who is not None:
            former, self._latest[who] = self._latest.get(who), job
            if former is not None and not former.begun:
                former.dropped = True
                former.end(error=Superseded())
        try:
            return await job.future  # type: ignore[no-any-return]
        finally:
            job.dropped = True  # whoever asked may have gone
            if who is not None and self._latest.get(who) is job:
                del self._latest[who]

    def _run(self) -> None:
        while True:
            job = self._queue.get()
            if job.dropped:
                continue
            job.begun = True
            try:
                job.end(job.work())
            except BaseException as error:  # is for who asked
                job.end(error=error)
