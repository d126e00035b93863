"""The command-line application: one module a command, each importing what is heavy only when it runs."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["app"]


class _Commands(TyperGroup):
    """Says what Ctrl-C leaves behind; typer itself exits without a word, or with 1, by its version."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; nothing half-written was kept", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="hflow-rt",
    cls=_Commands,
    help="Train image models that map images to latent codes and back, export them, run them, check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
