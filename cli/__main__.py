"""Entry point: `hflow-rt` and `python -m hflow_rt.cli`."""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["COMMANDS", "main"]

# modules; importing one registers its commands, and this is the order of the help
COMMANDS = (
    "demo",
    "dataset",
    "train",
    "curves",
    "import_checkpoint",
    "export",
    "sample",
    "encode",
    "score",
    "project",
    "interpolate",
    "evaluate",
    "bench",
    "tune",
    "info",
    "explore",
    "serve",
    "walk",
    "seeds",
    "heatmap",
    "zeroing",
    "temperature",
    "mix",
    "neighbours",
    "attribute",
)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 1; Ctrl-C exits 130."""
    with _interrupts() as interrupt:
        app = _commands()
        interrupt.listen()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # not in tests
                stream.reconfigure(errors="backslashreplace")  # what the terminal's alphabet lacks
        from hflow_rt.cli.terminal import note
        from hflow_rt.errors import HFlowError
        from hflow_rt.memory import is_out_of_memory

        if "" in sys.argv[1:]:  # as a path it would be the current folder
            note("error: an argument is empty; if it comes from a variable of the shell, set it")
            sys.exit(2)
        try:
            app(prog_name="hflow-rt")
        except BaseException as error:
            if interrupt.came and not isinstance(error, SystemExit):
                note("interrupted; nothing half-written was kept")
                sys.exit(130)
            if isinstance(error, HFlowError):
                note(f"error: {error}")
            elif is_out_of_memory(error):
                note(
                    "error: out of memory; ask for fewer images together: a smaller --batch or -n, or"
                    " training.batch_size with more training.accumulate"
                )
            elif isinstance(error, OSError) and error.filename is not None:
                note(f"error: cannot use {error.filename}: {error.strerror}; check the name and its permissions")
            else:
                raise
            sys.exit(1)


def __getattr__(name: str) -> Any:
    if name == "app":  # for who drives the commands from Python
        return _commands()
    raise AttributeError(name)


def _commands() -> Any:
    import importlib

    for name in COMMANDS:
        importlib.import_module(f"hflow_rt.cli.{name}")
    from hflow_rt.cli.app import app

    # a command that was imported before all others does not come first in the help
    for found in (app.registered_commands, app.registered_groups):
        found.sort(key=_rank)
    return app


def _rank(registered: Any) -> int:
    """Where the module that registered a command or a group of them stands in `COMMANDS`."""
    group = registered.typer_instance if hasattr(registered, "typer_instance") else None
    callback = registered.callback if group is None else group.registered_commands[0].callback
    return COMMANDS.index(callback.__module__.rpartition(".")[2])


class _Interrupt:
    """Ctrl-C, remembered: an import that it breaks off may fail as if a package were missing."""

    def __init__(self) -> None:
        self.came = False

    def listen(self) -> None:
        """From now on what has begun is cleaned up. Where SIGINT is ignored or handled already, it stays so."""
        if _on_main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def unraisable(self, lost: Any) -> None:
        """Where Python cannot raise it, as inside of callbacks, ask once more instead of a message of many lines."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()  # not from in here, where it would be lost again
        else:
            sys.__unraisablehook__(lost)


@contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    """While starting nothing is kept, so that Ctrl-C ends the process as it ends any other."""
    interrupt, former = _Interrupt(), None
    if _on_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        former, hook = signal.signal(signal.SIGINT, signal.SIG_DFL), sys.unraisablehook
        sys.unraisablehook = interrupt.unraisable
    try:
        yield interrupt
    finally:
        if former is not None:
            sys.unraisablehook = hook
            signal.signal(signal.SIGINT, former)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


if __name__ == "__main__":
    main()
