"""The command-line application: one module a command, each importing what is heavy only when it runs."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hflow_rt.cli.paths import check_paths
from hflow_rt.cli.terminal import note, say

__all__ = ["Commands", "app"]


class _Group(TyperGroup):
    """Says what Ctrl-C leaves behind; typer itself exits without a word, or with 1, by its version."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("interrupted; nothing half-written was kept")
            raise typer.Exit(130) from None


class _Command(TyperCommand):
    """Takes a MODEL also as --model, and looks at where a command would write before it runs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(one.param_type_name == "argument" and one.name == "model" for one in self.params):
            args = list(_as_argument(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        check_paths(ctx)
        return super().invoke(ctx)


def _as_argument(words: list[str]) -> Iterator[str]:
    """The words of a command without `--model` before the one that it names."""
    for index, word in enumerate(words):
        if word in ("--model", "-m") and index + 1 < len(words):
            continue
        yield word.removeprefix("--model=")


class Commands(typer.Typer):
    """A group of commands that keep our habits."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": _Command, **options})


def _version(asked: bool) -> None:
    if asked:
        from hflow_rt import __version__

        say(f"hflow-rt {__version__}")
        raise typer.Exit


app = Commands(
    name="hflow-rt",
    cls=_Group,
    help="Train image models that map images to latent codes and back, export them, run them, check them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What holds for all commands."""
