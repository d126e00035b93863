"""The command-line application: one module a command, each importing what is heavy only when it runs."""

from collections.abc import Callable
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
    """Looks at where a command would write before it runs."""

    def invoke(self, ctx: Any) -> Any:
        check_paths(ctx)
        return super().invoke(ctx)


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
