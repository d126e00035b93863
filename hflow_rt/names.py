"""Names as people see them in a terminal, and files as they paste them into a shell."""

import shlex
import unicodedata

__all__ = ["image_size", "quoted", "shown"]

# control characters, halves of characters, separators of lines: what moves the cursor or cannot be printed
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
# what turns the text after it around
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(text: object) -> str:
    """`text` fit for a terminal: control characters, and bytes of a name that are no UTF-8, are spelled out."""
    return "".join(map(_visible, str(text)))


def quoted(path: object) -> str:
    """`path` as one word that a shell reads back as it is, and that is fit for a terminal."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text  # which would be an option
    if shown(text) == text:
        return shlex.quote(text)
    spelled = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_visible, spelled))}'"


def image_size(side: int, channels: int) -> str:
    """`64x64`, or `28x28 grey`."""
    return f"{side}x{side}" + (" grey" if channels == 1 else "")


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN and character not in _TURNING:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
