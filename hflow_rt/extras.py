"""Packages that come with extras: missing is one thing, broken another, and an import that Ctrl-C ends is neither."""

from collections.abc import Iterator
from contextlib import contextmanager

from hflow_rt.errors import BackendUnavailable

__all__ = ["needed"]


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
