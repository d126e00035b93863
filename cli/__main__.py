"""Entry point: `hflow-rt` and `python -m hflow_rt.cli`."""

import sys

from hflow_rt.cli import dataset, demo, encode, export, info, interpolate, sample, train
from hflow_rt.cli.app import app
from hflow_rt.errors import HFlowError

__all__ = ["COMMANDS", "main"]

# importing a module registers its commands; the order is that of the help
COMMANDS = (demo, dataset, train, export, sample, encode, interpolate, info)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 1; Ctrl-C exits 130."""
    try:
        app(prog_name="hflow-rt")
    except HFlowError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
