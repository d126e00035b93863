"""Pictures in and out: files to arrays, arrays to grids, grids to files.

Images are uint8 `[B, H, W, C]` to look at and float32 `[B, C, R, R]` in [0, 1] for models; `v / 255` and
rounding lead from one to the other, so an 8-bit image survives the trip unchanged. C is 3, or 1 for grey images, of
which grey pictures are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from hflow_rt.data.pixels import to_levels
from hflow_rt.errors import DataError
from hflow_rt.files import atomic_file, is_folder, is_ours
from hflow_rt.memory import need

if TYPE_CHECKING:
    from hflow_rt.data.image_files import Skipped

__all__ = [
    "Row",
    "captioned",
    "check_folder",
    "check_picture_name",
    "check_picture_size",
    "check_pictures",
    "check_pixels",
    "coloured",
    "from_uint8",
    "grid",
    "grid_size",
    "heat_colours",
    "image_of_bytes",
    "labelled_rows",
    "read_image",
    "save_image",
    "strip",
    "table",
    "table_size",
    "to_picture",
    "to_uint8",
    "write_pictures",
    "written_by",
]

# violet, blue, green and yellow of even steps in lightness, so that grey print and any eye can read them
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

_LABEL, _CAPTION = 16, 12  # pixels: height of the letters beside rows, and under images
_PADDING = 2  # pixels between images
_LABEL_WIDTH = 240  # pixels: a label longer than this is shortened
_VISIBLE = 96  # pixels: a cell smaller than this is enlarged, so that people can see it

_FORMATS: dict[str, tuple[str, int, dict[str, Any]]] = {  # suffix: Pillow's name, largest side, settings
    ".png": ("PNG", 2**31 - 1, {}),
    ".jpg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16_383, {"lossless": True}),
}
_WRITER = "hflow-rt"  # what pictures name as their software, see `hflow_rt.files.is_ours`
_SOFTWARE = 0x0131  # the tag of EXIF for it
_SCREEN = 2048  # pixels across
_LARGE = 2**20  # pixels; larger pictures are a tenth larger on disk and written three times as fast

# what makes a file no image; other reasons leave its content unknown, or whole
_DAMAGED = ("empty file", "not an image", "broken image")


def to_uint8(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Float `[B, C, R, R]` in [0, 1] to uint8 `[B, R, R, C]`, rounded; values a little outside are clipped.

    Raises `DataError` for another shape or type and for NaN.
    """
    return np.ascontiguousarray(to_levels(images).transpose(0, 2, 3, 1))


def from_uint8(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 `[B, H, W, C]` to float32 `[B, C, H, W]`, `v / 255`; raises as `check_pixels` does."""
    check_pixels(images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def to_picture(image: NDArray[np.uint8]) -> Image.Image:
    """uint8 `[H, W, C]` as a picture of Pillow's, grey for one channel."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def coloured(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 `[..., C]` as `[..., 3]`: grey as three equal colours."""
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def check_pixels(images: NDArray[np.uint8], what: str = "images") -> None:
    """Raise `DataError` unless `images` is a non-empty uint8 array `[B, H, W, C]`."""
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or images.size == 0:
        found = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{what} must be uint8 [B, H, W, 3 or 1] and not empty; found {found}")


def read_image(path: Path | str, resolution: int, crop: str = "center", channels: int = 3) -> NDArray[np.float32]:
    """An image file as float32 `[C, R, R]` in [0, 1]: turned as its EXIF says, in sRGB, transparency on white.

    `crop` is `center` (the largest square in the middle) or `none` (the image must be square); what is larger
    than R is reduced with a Lanczos filter. channels: C; with 1 it is the luminance.
    Raises `DataError` for a file that is missing, damaged, no image, too large or too small.
    """
    from hflow_rt.data.image_files import read_file

    if crop not in ("center", "none"):
        raise DataError(f"crop must be 'center' or 'none'; found '{crop}'")
    return _fitted(read_file(path), path, resolution, crop == "none", channels)


def image_of_bytes(data: bytes, name: str, resolution: int, channels: int = 3) -> NDArray[np.float32]:
    """As `read_image`, of the bytes of a file that is called `name`."""
    from hflow_rt.data.image_files import read_bytes

    return _fitted(read_bytes(data), name, resolution, False, channels)


def _fitted(
    picture: "Image.Image | Skipped", name: Path | str, resolution: int, whole: bool, channels: int
) -> NDArray[np.float32]:
    from hflow_rt.data.image_files import Skipped
    from hflow_rt.data.resize import fit

    if isinstance(picture, Skipped):
        if picture.reason in _DAMAGED:
            raise DataError(f"{name} is not a whole image of a known kind: {picture.detail}; convert or copy it again")
        if picture.reason == "too large":
            raise DataError(f"{name} cannot be used: {picture.detail}; reduce it first")
        raise DataError(f"no image at {name}: {picture.detail}; check the name")
    fitted = fit(picture, resolution, "none" if whole else "center", channels)
    if isinstance(fitted, Skipped):
        wanted = f"{resolution}x{resolution}"
        raise DataError(f"{name} cannot be used: {fitted.detail}; give a square image of at least {wanted}")
    return np.divide(fitted, 255, dtype=np.float32)


def grid(
    images: NDArray[np.uint8], columns: int | None = None, padding: int = _PADDING, scale: int | None = None
) -> Image.Image:
    """uint8 `[B, H, W, C]` in rows on white, `padding` pixels apart; nearly square unless `columns` is given.

    Each pixel becomes `scale` x `scale`; without it small images are enlarged to about 96 pixels, but no square grid
    to more than a screen.
    Raises `DataError` for an empty or wrong array and for counts out of range.
    """
    check_pixels(images)
    count, height, width, channels = images.shape
    columns, scale = _arranged(count, width, height, columns, scale)
    if columns < 1 or padding < 0 or scale < 1:
        found = f"{columns}, {padding} and {scale}"
        raise DataError(f"a grid needs columns >= 1, padding >= 0 and scale >= 1; found {found}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    step_y, step_x = height * scale + padding, width * scale + padding
    shape = (rows * step_y + padding, columns * step_x + padding, channels)
    _check_memory(shape[1], shape[0])
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * step_y, padding + column * step_x
        canvas[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return to_picture(canvas)


def grid_size(count: int, side: int, columns: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of the `grid` of `count` images of `side`, before there are any."""
    columns, scale = _arranged(max(1, count), side, side, columns, None)
    step = side * scale + _PADDING
    return min(columns, count) * step + _PADDING, math.ceil(count / columns) * step + _PADDING


def table_size(columns: int, rows: int, side: int) -> tuple[int, int]:
    """Width and height in pixels that a `table` of so many images of `side` has at least, beside its words."""
    width, height = grid_size(columns, side, max(1, columns))
    return width, rows * height


def strip(images: NDArray[np.uint8], padding: int = _PADDING, scale: int | None = None) -> Image.Image:
    """`grid` in one row."""
    check_pixels(images)
    return grid(images, columns=len(images), padding=padding, scale=scale)


@dataclass(frozen=True)
class Row:
    """Images uint8 `[B, H, W, C]` side by side, a label to their left and a caption (of several lines) under each."""

    images: NDArray[np.uint8]
    label: str = ""
    captions: Sequence[str] = ()


def table(rows: Sequence[Row], padding: int = _PADDING, scale: int | None = None) -> Image.Image:
    """Rows of any length below each other, each a `strip` with its words; words too long for their place are cut.

    Grey if all images are.
    Raises `DataError` for no rows, a wrong array, or more captions than images.
    """
    if not rows:
        raise DataError("at least one row of images must be shown; found none")
    strips = [_captioned_strip(row, padding, scale) for row in rows]
    font = ImageFont.load_default(_LABEL)
    gap = 8
    labels = [_shortened(row.label, font, _LABEL_WIDTH) for row in rows]
    width = math.ceil(max(font.getbbox(label)[2] for label in labels))
    margin = gap + width + gap if width else 0
    size = margin + max(s.width for s in strips), sum(s.height for s in strips)
    _check_memory(*size)
    canvas = Image.new("L" if {s.mode for s in strips} == {"L"} else "RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    top = 0
    for label, row in zip(labels, strips, strict=True):
        canvas.paste(row, (margin, top))
        pen.text((margin - gap, top + row.height / 2), label, fill="black", font=font, anchor="rm")
        top += row.height
    return canvas


def labelled_rows(
    rows: Sequence[tuple[str, NDArray[np.uint8]]], padding: int = _PADDING, scale: int | None = None
) -> Image.Image:
    """`table` of (label, uint8 `[B, H, W, C]`) pairs."""
    return table([Row(images, label) for label, images in rows], padding, scale)


def captioned(
    images: NDArray[np.uint8],
    captions: Sequence[str],
    columns: int | None = None,
    padding: int = _PADDING,
    scale: int | None = None,
) -> Image.Image:
    """`grid` with a caption under each image; raises as `grid` does, and unless there is one caption an image."""
    check_pixels(images)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or len(captions) != len(images):
        found = f"{columns} columns and {len(captions)} captions for {len(images)} images"
        raise DataError(f"a captioned grid needs columns >= 1 and a caption for each image; found {found}")
    starts = range(0, len(images), columns)
    rows = [Row(images[at : at + columns], captions=captions[at : at + columns]) for at in starts]
    return table(rows, padding, scale)


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Numbers in [0, 1] of any shape as colours `[..., 3]`, dark violet to yellow, ever lighter; clipped beyond."""
    steps = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(np.clip(values, 0, 1), steps, channel) for channel in np.transpose(_RAMP)]
    colours: NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


def _captioned_strip(row: Row, padding: int, scale: int | None) -> Image.Image:
    images = strip(row.images, padding, scale)
    lines = max((caption.count("\n") + 1 for caption in row.captions if caption), default=0)
    if len(row.captions) > len(row.images):
        raise DataError(f"{len(row.images)} images cannot have {len(row.captions)} captions")
    if not lines:
        return images
    font = ImageFont.load_default(_CAPTION)
    canvas = Image.new(images.mode, (images.width, images.height + lines * (_CAPTION + 3) + 3), "white")
    canvas.paste(images)
    pen = ImageDraw.Draw(canvas)
    cell = (images.width - padding) / len(row.images)
    for index, caption in enumerate(row.captions):
        for line, text in enumerate(caption.split("\n")):
            place = (padding / 2 + (index + 0.5) * cell, images.height + line * (_CAPTION + 3))
            pen.text(place, _shortened(text, font, cell - padding), fill="black", font=font, anchor="ma")
    return canvas


def _shortened(text: str, font: Any, width: float) -> str:
    """`text` if it is at most `width` pixels wide, else as much of it as fits before three dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _arranged(count: int, width: int, height: int, columns: int | None, scale: int | None) -> tuple[int, int]:
    """Columns and enlargement of a grid, where they are not given."""
    square = math.ceil(math.sqrt(count))
    if scale is None:
        scale = max(1, math.ceil(_VISIBLE / min(height, width)))
        if columns is None:
            scale = max(1, min(scale, _SCREEN // (square * width)))
    return square if columns is None else columns, scale


def _check_memory(width: int, height: int) -> None:
    # three bytes a pixel in the array and four in Pillow's picture
    need(7 * width * height, f"a picture of {width:,}x{height:,} pixels", "ask for fewer images")


def check_picture_size(path: Path, width: int, height: int) -> None:
    """Raise what `save_image` would for so many pixels, before anything is computed for them."""
    name, largest, _ = _FORMATS[path.suffix.lower()]
    if max(width, height) > largest:
        other = "" if name == "PNG" else ", or name a .png"
        raise DataError(
            f"{path}: {name} pictures end at {largest:,} pixels a side, and this one would be {width:,}x{height:,};"
            f" ask for fewer images{other}"
        )
    _check_memory(width, height)


def check_picture_name(path: Path) -> None:
    """Raise `DataError` unless the suffix names a format that `save_image` writes."""
    if path.suffix.lower() not in _FORMATS:
        raise DataError(f"a picture's name must end in {', '.join(_FORMATS)}; found '{path.name}'; rename it")


def save_image(path: Path | str, image: Image.Image) -> None:
    """Write a picture in the format its suffix names.

    Raises `DataError` for another suffix, for more pixels than the format has, or if the file cannot be written.
    """
    path = Path(path)
    check_picture_name(path)
    check_picture_size(path, image.width, image.height)
    name, _, settings = _FORMATS[path.suffix.lower()]
    if name == "PNG" and image.width * image.height > _LARGE:
        settings = settings | {"compress_level": 1}
    with atomic_file(path) as temporary:
        image.save(temporary, format=name, **settings, **written_by(name))


def written_by(name: str) -> dict[str, Any]:
    """Settings of Pillow's writer of the format `name` that leave ours in the file."""
    if name == "PNG":
        about = PngInfo()
        about.add_text("Software", _WRITER)
        return {"pnginfo": about}
    if name == "WEBP":
        tags = Image.Exif()
        tags[_SOFTWARE] = _WRITER
        return {"exif": tags}
    return {"comment": _WRITER.encode()}


def check_folder(output: Path, indices: range) -> None:
    """Raise `DataError` where `write_pictures` would replace a file in the folder that hflow-rt did not write."""
    if not is_folder(output):
        return
    for path in output.glob("*.png"):
        among = path.stem.isdecimal() and int(path.stem) in indices and path.name == f"{int(path.stem):06d}.png"
        if among and not is_ours(path):
            raise DataError(f"{path} exists, was not written by hflow-rt and was not named; choose another folder")


def check_pictures(output: Path, indices: range, side: int) -> None:
    """Raise what `write_pictures` of images of these indices would, before anything is computed for them."""
    if not output.suffix:
        check_folder(output, indices)
        return
    check_picture_name(output)
    check_picture_size(output, *grid_size(len(indices), side))


def write_pictures(output: Path, images: NDArray[np.uint8], start: int = 0) -> str:
    """Write uint8 `[N, R, R, C]` as one grid if `output` names an image file, else one file each in that folder."""
    if output.suffix:
        save_image(output, grid(images))
        return str(output)
    for index, image in enumerate(images):
        save_image(output / f"{start + index:06d}.png", to_picture(image))
    return f"{output}/"
