"""Names of files in folders and archives."""

__all__ = ["clean", "is_hidden", "slashes"]


def is_hidden(name: str) -> bool:
    """Whether it is hidden, or left over by macOS (`.name`, `__MACOSX/`)."""
    parts = [part for part in slashes(name).split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def slashes(name: str) -> str:
    """A name with `/` between folders, also where it was made on Windows."""
    return name.replace("\\", "/")


def clean(name: str) -> str:
    """A name without leading `./` and with bytes that are not UTF-8 spelled out, so that JSON can hold it."""
    return slashes(name).removeprefix("./").encode(errors="surrogateescape").decode(errors="backslashreplace")
