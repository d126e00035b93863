"""The command-line application: one module a command, each importing what is heavy only when it runs."""

import typer

__all__ = ["app"]

app = typer.Typer(
    name="hflow-rt",
    help="Train image models that map images to latent codes and back, export them, run them, check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
