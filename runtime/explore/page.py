"""Where the page lies, and what it may load and do."""

from importlib.resources import files
from pathlib import Path

__all__ = ["PAGE", "POLICY"]

PAGE = Path(str(files(__package__) / "web-page"))
# nothing that is not from here, no script inside of the page
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
