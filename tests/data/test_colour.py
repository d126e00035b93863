"""Embedded colour profiles become sRGB. The profiles are made here: a few curves and matrices, or a table."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from hflow_rt.data.image_files import to_rgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# white, and what a colour of (60, 200, 60) in wide() is in sRGB
WHITE, GREEN, IN_SRGB = (255, 255, 255), (60, 200, 60), (0, 201, 37)


def s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A profile of ICC version 2."""
    text = b"made for a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249),
    } | tags
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, kind, space, connection) + bytes(12) + b"acsp"
    head += bytes(28) + s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def wide() -> bytes:
    """The primaries of Adobe RGB (1998), adapted to D50, and gamma 2.2."""
    colorants = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    tags = {name: b"XYZ \0\0\0\0" + s15(*xyz) for name, xyz in colorants.items()}
    return profile(b"RGB ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(2.2)))


def grey(gamma: float) -> bytes:
    return profile(b"GRAY", b"mntr", {b"kTRC": curve(gamma)})


def ink() -> bytes:
    """A table from CMYK to Lab, of which only black changes lightness: 100 without it, 0 with all of it."""
    ends = [(255 * (1 - black), 128, 128) for *_, black in np.ndindex(2, 2, 2, 2)]
    identity, linear = s15(1, 0, 0, 0, 1, 0, 0, 0, 1), bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * linear
    return profile(b"CMYK", b"prtr", {b"A2B0": lut + bytes(np.array(ends, np.uint8)) + 3 * linear}, b"Lab ")


def saved(image: Image.Image, embedded: bytes, kind: str = "PNG") -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=embedded)
    return Image.open(buffer)


def first(image: Image.Image) -> object:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return converted.getpixel((0, 0))


def close(found: object, expected: tuple[int, ...]) -> bool:
    return bool(np.abs(np.subtract(found, expected)).max() <= 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colour_profile_ignored(kind: str) -> None:
    image = Image.new("RGB", (4, 4), GREEN)
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=wide(), **({"lossless": True} if kind == "WEBP" else {}))
    assert close(first(Image.open(buffer)), IN_SRGB)


def test_it_is_what_littlecms_makes_of_it() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    expected = ImageCms.profileToProfile(
        noise, io.BytesIO(wide()), ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    assert expected is not None
    assert np.abs(np.asarray(expected).astype(int) - np.asarray(noise)).max() > 20
    np.testing.assert_array_equal(to_rgb(saved(noise, wide())), expected)


def test_a_small_difference_counts_and_rounding_does_not() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    for embedded, differs in ((grey(2.2), True), (SRGB, False)):
        found = np.asarray(to_rgb(saved(Image.fromarray(levels), embedded)))[..., 0].astype(int)
        assert (3 < np.abs(found - levels).max() < 10) == differs
        assert (found == levels).all() != differs


@pytest.mark.parametrize("embedded", [SRGB, b"", b"no profile", SRGB[:300], wide()[:200], grey(2.2), ink()])
def test_srgb_and_what_cannot_be_read_or_belongs_to_others_change_nothing(embedded: bytes) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(to_rgb(saved(Image.fromarray(noise), embedded)), noise)


def test_transparency_is_composited_after_the_conversion() -> None:
    image = Image.new("RGBA", (4, 1), (*GREEN, 255))
    image.putpixel((1, 0), (*GREEN, 0))
    image.putpixel((2, 0), (*GREEN, 128))
    converted = to_rgb(saved(image, wide()))
    assert close(converted.getpixel((0, 0)), IN_SRGB)
    assert converted.getpixel((1, 0)) == WHITE
    half = np.add(np.multiply(IN_SRGB, 128), np.multiply(WHITE, 127)) / 255
    assert np.abs(np.subtract(converted.getpixel((2, 0)), half)).max() <= 1


def test_palettes_colour_keys_and_grey_have_profiles_of_colour() -> None:
    palette = Image.new("P", (4, 4))
    palette.putpalette([*GREEN, 0, 0, 255])
    assert close(first(saved(palette, wide())), IN_SRGB)
    keyed = Image.new("RGB", (4, 4), GREEN)
    keyed.putpixel((1, 0), (1, 2, 3))
    buffer = io.BytesIO()
    keyed.save(buffer, "PNG", icc_profile=wide(), transparency=(1, 2, 3))
    converted = to_rgb(Image.open(buffer))
    assert close(converted.getpixel((0, 0)), IN_SRGB)
    assert converted.getpixel((1, 0)) == WHITE
    expected = first(saved(Image.new("RGB", (4, 4), (50, 50, 50)), wide()))
    assert expected != (50, 50, 50)
    assert first(saved(Image.new("L", (4, 4), 50), wide())) == expected


def test_grey_profiles() -> None:
    # 0.5 ** 1.0 is linear light, and sRGB writes half the light as 188
    assert close(first(saved(Image.new("L", (4, 4), 128), grey(1.0))), (188, 188, 188))
    transparent = Image.new("LA", (4, 1), (128, 255))
    transparent.putpixel((1, 0), (128, 0))
    converted = to_rgb(saved(transparent, grey(1.0)))
    assert close(converted.getpixel((0, 0)), (188, 188, 188))
    assert converted.getpixel((1, 0)) == WHITE


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_converted_by_its_profile(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(buffer, kind, icc_profile=ink())
    assert close(first(Image.open(buffer)), WHITE)  # this cyan has no colour; without the profile it is (0, 255, 255)
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(buffer, kind, icc_profile=ink())
    assert close(first(Image.open(buffer)), (0, 0, 0))
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(buffer, kind)
    assert close(first(Image.open(buffer)), (0, 255, 255))


def test_lab_needs_no_profile() -> None:
    buffer = io.BytesIO()
    Image.new("LAB", (4, 4), (255, 128, 128)).save(buffer, "TIFF", icc_profile=wide())
    assert close(first(Image.open(buffer)), WHITE)


def test_16_bit_grey_keeps_its_levels() -> None:
    image = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert first(saved(image, grey(1.0))) == (128, 128, 128)
