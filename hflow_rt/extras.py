"""Packages that come with extras: missing is one thing, broken another, and an import that Ctrl-C ends is neither."""

from collections.abc import Iterator
from contextlib import contextmanager

from hflow_rt.errors import BackendUnavailable

__all__ = ["need_extra", "needed"]


def need_extra(extra: str, *packages: str, what: str = "this command") -> None:
    """Raise `BackendUnavailable` unless all `packages` of an extra, such as `train`, are installed, for `what`."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise BackendUnavailable(f"{what} needs {package}: pip install 'hflow-rt[{extra}]'")


@contextmanager
def needed(package: str, message: str) -> Iterator[None]:
    """Raise `BackendUnavailable` with `message` if what is imported inside lacks `package`.

    One that is installed and does not load is another fault, and the line says which.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # a part that an old version lacks is missing, too
            raise _broken(package, error) from error
        raise BackendUnavailable(message) from error
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        raise _broken(package, error) from error


def _broken(package: str, error: Exception) -> BackendUnavailable:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return BackendUnavailable(f"{package} is installed and cannot be loaded ({reason}); see 'hflow-rt doctor'")
