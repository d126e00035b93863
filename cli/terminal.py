"""What commands say: results on stdout, everything else on stderr, each line fit for the terminal it goes to."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hflow_rt.names import shown

__all__ = ["note", "print_json", "say", "say_next", "status", "tracked"]

T = TypeVar("T")


def say(line: str = "") -> None:
    """One line of the result, on stdout; what names of files hide in it is spelled out."""
    print(shown(line))


def note(line: str) -> None:
    """One line beside the result, on stderr, as `say` prints it."""
    print(shown(line), file=sys.stderr, flush=True)


def say_next(*commands: str) -> None:
    """Close with what is useful now: commands to paste, whose paths went through `hflow_rt.names.quoted`."""
    for index, command in enumerate(commands):
        say(("next: " if index == 0 else "      ") + command)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=1))


@contextmanager
def status(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show what is being done: a spinner on a terminal, a plain line each when piped, nothing when quiet."""
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        started = time.monotonic()
        with Console(stderr=True).status("starting") as spinner:
            yield lambda text: spinner.update(f"{escape(shown(text))} ({time.monotonic() - started:.0f} s)")
    else:
        yield note


def tracked(
    items: Iterable[T], total: int, size: Callable[[T], int], label: str, told: Callable[[T], str] | None = None
) -> Iterator[T]:
    """Yield `items`, on a terminal with rate and time left; `size` says how many of `total` an item stands for.

    told: what to say of an item instead of images per second.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task(label, total=total, rate=""), 0
        for item in items:
            yield item
            done += size(item)
            rate = f"{done / max(time.monotonic() - started, 1e-9):.1f} images/s" if told is None else told(item)
            bar.update(task, completed=done, rate=rate)
