"""Entry point: `hflow-rt` and `python -m hflow_rt.cli`."""

import importlib
import sys

from hflow_rt.cli.app import app
from hflow_rt.errors import HFlowError

__all__ = ["COMMANDS", "main"]

# modules; importing one registers its commands, and this is the order of the help
COMMANDS = (
    "demo",
    "dataset",
    "train",
    "import_checkpoint",
    "export",
    "sample",
    "encode",
    "interpolate",
    "evaluate",
    "bench",
    "tune",
    "info",
    "walk",
    "seeds",
    "heatmap",
    "zeroing",
    "temperature",
    "mix",
    "neighbours",
    "attribute",
)
for _name in COMMANDS:
    importlib.import_module(f"hflow_rt.cli.{_name}")


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 1; Ctrl-C exits 130."""
    try:
        app(prog_name="hflow-rt")
    except HFlowError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
