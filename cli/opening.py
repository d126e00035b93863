"""Finding a model and opening it, and saying on stderr what was found."""

from pathlib import Path
from typing import TYPE_CHECKING

from hflow_rt.cli.terminal import note, status
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.runtime.bundle import Bundle
    from hflow_rt.runtime.session import Session

__all__ = ["locate", "locate_bundle", "named", "open_session", "warn_if_busy"]


def locate(model: Path | None, quiet: bool = False) -> Path:
    """The path of `model`, by default the latest run under ./runs; a bundled model is named on stderr."""
    from hflow_rt.runtime.bundle import chosen_model

    found, line = chosen_model(model)
    if line and not quiet:
        note(line)
    return found


def locate_bundle(model: Path | None, quiet: bool = False) -> "Bundle":
    """The bundle of what `locate` finds; a line on stderr says if that run has newer weights. Raises `BundleError`."""
    from hflow_rt.runtime.bundle import find_bundle

    found = find_bundle(locate(model, quiet))
    if found.outdated is not None:
        note(f"warning: {found.outdated}")
    return found


def open_session(
    model: Path | None,
    backend: str,
    device: str,
    quiet: bool = False,
    cuda_graph: bool | None = None,
    view: tuple[int | None, str | None] = (None, None),
) -> "Session":
    """Open the model and say on stderr what was opened, and once if nobody has proved it yet.

    view: resolution and region of the images, if they are not those of the model; exported where nobody has yet.
    """
    from hflow_rt.runtime.backends import check_backend
    from hflow_rt.runtime.session import open_bundle

    check_backend(backend, device)
    bundle = locate_bundle(model, quiet)
    if view != (None, None):
        from hflow_rt.export.making import viewed

        with status(quiet) as progress:
            bundle = viewed(bundle, *view, progress, note)
    session = open_bundle(bundle, backend, device, cuda_graph=cuda_graph)
    if not quiet:
        manifest = bundle.manifest
        note(f"{manifest.family} {manifest.size} from {bundle.path} on {session.backend}")
    if not session.verified:
        what, how = ("bundle", "") if session.engines is None else ("engine", f" --backend {backend}")
        note(
            f"warning: this {what} is unverified (parity failed or never ran); "
            f"see 'hflow-rt check {quoted(bundle.path)}{how}'"
        )
    return session


def named(model: Path | None, option: str = "") -> str:
    """What a next command needs to find `model` again: nothing for the latest run."""
    return "" if model is None else f" {option}{quoted(model)}"


def warn_if_busy(quiet: bool) -> None:
    """Say so if what is measured next on this machine will mislead."""
    from hflow_rt.bench.machine import busy

    if (found := busy()) and not quiet:
        note(f"warning: {found}; what is chosen by measuring may not be the fastest")
