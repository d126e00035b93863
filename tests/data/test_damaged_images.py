"""What is wrong with pixels decides whether an image is used, what is wrong with metadata does not; all in silence."""

import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from hflow_rt.data.image_files import Skipped, read_file
from hflow_rt.data.sources import open_source

RED, WHITE = (255, 0, 0), (255, 255, 255)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def read(source: Path) -> dict[str, Image.Image | Skipped]:
    with open_source(source) as images:
        return dict(images)


def reasons(source: Path) -> dict[str, str]:
    return {name: image.reason if isinstance(image, Skipped) else "used" for name, image in read(source).items()}


TURNED = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # an entry of EXIF: to be turned by 90 degrees clockwise
BEYOND = struct.pack(">HHII", 0x010F, 2, 4096, 0xFFFF)  # the maker's name, beyond the end


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ([TURNED], (8, 16)),
        ([TURNED, BEYOND], (8, 16)),
        ([struct.pack(">HHII", 0x0112, 3, 4096, 0xFFFF)], (16, 8)),  # the orientation itself is lost
        ([TURNED, TURNED[:5]], (8, 16)),  # cut off
        ([TURNED[:5]], (16, 8)),
        ([], (16, 8)),
    ],
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_whole_pixels_broken_exif(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, entries: list[bytes], size: tuple[int, int], kind: str
) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries)
    exif = exif if entries else b"Exif\0\0no EXIF"
    Image.new("RGB", (16, 8), RED).save(tmp_path / f"a.{kind}", exif=exif)
    for image in (read(tmp_path)[f"a.{kind}"], read_file(tmp_path / f"a.{kind}")):
        assert isinstance(image, Image.Image)
        assert image.size == size
    assert list(recwarn) == []


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


@pytest.mark.parametrize("at", [33, -12])  # after the header, before the end
@pytest.mark.parametrize(
    "damaged",
    [
        chunk(b"tEXt", b"key\0value", damage=1),
        chunk(b"eXIf", b"II*\0", damage=1),
        chunk(b"pHYs", b"\0"),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**21))),  # longer than Pillow takes
    ],
)
def test_whole_pixels_broken_chunks(tmp_path: Path, damaged: bytes, at: int) -> None:
    data = png(Image.new("RGB", (8, 8), RED), icc_profile=b"", transparency=RED)
    (tmp_path / "a.png").write_bytes(data[:at] + damaged + data[at:])
    image = read(tmp_path)["a.png"]
    assert isinstance(image, Image.Image)
    assert image.getpixel((0, 0)) == WHITE  # what the pixels need is kept


@pytest.mark.parametrize("kind", [b"IDAT", b"PLTE", b"tRNS"])
def test_broken_chunks_of_pixels_are_refused(tmp_path: Path, kind: bytes) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, *RED])
    data = bytearray(png(palette, transparency=0))
    start = data.index(kind)
    data[start + 4] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    assert reasons(tmp_path)["a.png"] in ("broken image", "not an image")


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyError, AssertionError, ZeroDivisionError, RecursionError, MemoryError]
)
def test_damaged_image_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def load(image: Image.Image) -> None:
        raise error("failed to decode")

    monkeypatch.setattr(PngImageFile, "load", load)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    reason = "too large" if error is MemoryError else "broken image"
    assert reasons(tmp_path) == {"a.png": reason}
    found = read_file(tmp_path / "a.png")
    assert isinstance(found, Skipped)
    assert found.reason == reason


def test_damaged_compressed_tiff_says_nothing_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.tiff", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tiff").read_bytes())
    data[100:400] = b"\xff" * 300
    (tmp_path / "a.tiff").write_bytes(data)
    assert reasons(tmp_path) == {"a.tiff": "broken image"}
    os.write(2, b"after")
    assert capfd.readouterr() == ("", "after")


def test_what_pillow_logs_is_not_printed() -> None:
    """A TIFF of too many samples a pixel: Pillow logs an error, which Python prints by default."""
    code = (
        "import io, sys; from PIL import Image, TiffImagePlugin; from hflow_rt.data.image_files import read_file\n"
        "ifd = TiffImagePlugin.ImageFileDirectory_v2(); ifd[277] = 3\n"
        "Image.new('RGB', (8, 8)).save('many.tiff', tiffinfo=ifd)\n"
        "data = bytearray(open('many.tiff', 'rb').read())\n"
        "data[data.index(b'\\x15\\x01\\x03\\x00') + 8] = 99\n"
        "open('many.tiff', 'wb').write(data); print(read_file('many.tiff').reason)"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert (done.stdout, done.stderr) == ("not an image\n", "")
