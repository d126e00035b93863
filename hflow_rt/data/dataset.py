"""Images as one uint8 array `[N, 3, R, R]`: built once into a `.npy` file, or decoded on the fly.

A dataset is two files: `NAME.npy`, a plain NumPy array that is mapped into memory, and `NAME.json`, a
`DatasetInfo` that says where it came from and holds the hash that proves the array is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hflow_rt.data.resize import Crop, fit
from hflow_rt.data.sources import ImageSource, Skipped, open_source
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.files import atomic_file, sha256

__all__ = ["DatasetInfo", "ImageSet", "Progress", "build_dataset", "open_dataset"]

Progress = Callable[[int, int], None]

# Held out when the names do not say it: one image in ten.
HELD_OUT = 0.1
# Images decoded on the fly stay in memory up to this many bytes, then move to a temporary file.
MAX_MEMORY_BYTES = 2**30
# One header size for every image count, so that it can be written before the images are counted.
HEADER_BYTES = 128


class DatasetInfo(BaseModel):
    """What `NAME.json` holds. `sha256` is of the `.npy` file's bytes, `skipped` counts files by reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    source: str
    count: int
    resolution: int
    crop: Crop
    sha256: str
    skipped: dict[str, int]
    names: list[str]


class ImageSet:
    """Images in a fixed order.

    `hash` changes with any name, pixel or the order, and is the same for the same images whether they come
    from a folder, a zip or a `.npy` built of it. `skipped` counts by reason the files of the source not used.
    """

    def __init__(self, array: NDArray[np.uint8], names: list[str], skipped: dict[str, int], array_sha256: str) -> None:
        self._array = array
        self.names = names
        self.skipped = skipped
        self.hash = hashlib.sha256(json.dumps([names, array_sha256]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def resolution(self) -> int:
        """Side of every image in pixels."""
        return int(self._array.shape[-1])

    def pixels(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """The images at `indices` (any order, repeats allowed) as a new uint8 array `[n, 3, R, R]`."""
        return self._array[np.asarray(indices, dtype=np.int64)]

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the images to train on, and of those held out; both ascending.

        Where every name lies in a top folder `train/`, `test/` or `val/` and both sides have images, the
        folders decide. Otherwise a hash of the name decides (about a tenth is held out), so that adding
        images moves none from one side to the other, save in sets so small that the rule would leave a side
        empty. A single image is trained on.
        """
        top = [name.split("/")[0] if "/" in name else "" for name in self.names]
        held = np.array([folder != "train" for folder in top])
        if not set(top) <= {"train", "test", "val"} or held.all() or not held.any():
            draw = np.array([_uniform(name) for name in self.names])
            held = draw < HELD_OUT
            if len(held) == 1 or held.all():
                held[draw.argmax()] = False
            elif not held.any():
                held[draw.argmin()] = True
        return np.flatnonzero(~held), np.flatnonzero(held)


def build_dataset(
    source: Path | str,
    output: Path | str,
    resolution: int,
    crop: Crop = "center",
    strict: bool = False,
    progress: Progress | None = None,
) -> DatasetInfo:
    """Decode a folder, zip or tar into `output` (`.npy`, uint8 `[N, 3, R, R]`) and its `.json`, atomically.

    `strict` refuses the first file that cannot be used instead of skipping it; `progress` is called with the
    files done and the files in all. Raises `DataError` (nothing usable, unreadable, unwritable) or
    `ConfigError`.
    """
    output = Path(output)
    if output.suffix != ".npy":
        raise ConfigError(f"the dataset file must end in .npy, not '{output.name}'")
    _check_settings(resolution, crop)
    with (
        open_source(source) as images,  # first, so that a wrong source leaves no new folder behind
        atomic_file(output.with_suffix(".json")) as info_file,
        atomic_file(output) as array_file,  # last, so renamed first: the JSON never vouches for a missing array
    ):
        with open(array_file, "wb") as sink:
            sink.write(bytes(HEADER_BYTES))
            names, skipped = _decode(images, source, resolution, crop, strict, progress, sink.write)
            sink.seek(0)
            sink.write(_header(len(names), resolution))
        info = DatasetInfo(
            source=str(source),
            count=len(names),
            resolution=resolution,
            crop=crop,
            sha256=sha256(array_file),
            skipped=skipped,
            names=names,
        )
        info_file.write_text(json.dumps(info.model_dump(), indent=1) + "\n")
    return info


def open_dataset(
    source: Path | str, resolution: int, crop: Crop = "center", progress: Progress | None = None
) -> ImageSet:
    """A `.npy` written by `build_dataset` (mapped, checked against its hash), or a folder, zip or tar.

    The latter are decoded into memory, above 1 GiB into a temporary file that vanishes with the process.
    `crop` concerns only these: a `.npy` is square already. Raises `DataError` or `ConfigError`.
    """
    _check_settings(resolution, crop)
    path = Path(source)
    if path.suffix == ".npy" and not path.is_dir():
        return _open_array(path, resolution)
    with open_source(path) as images, _Spool() as spool:
        names, skipped = _decode(images, path, resolution, crop, False, progress, spool.write)
        array = spool.array((len(names), 3, resolution, resolution))
    digest = hashlib.sha256(_header(len(names), resolution))  # the hash that the .npy of these images would have
    digest.update(array.reshape(-1).data)
    return ImageSet(array, names, skipped, digest.hexdigest())


def _decode(
    images: ImageSource,
    source: Path | str,
    resolution: int,
    crop: Crop,
    strict: bool,
    progress: Progress | None,
    write: Callable[[bytes], object],
) -> tuple[list[str], dict[str, int]]:
    """Hand each usable image's pixels to `write`; their names, and the count of the others by reason."""
    names: list[str] = []
    skipped: list[Skipped] = []
    for done, (name, image) in enumerate(images, 1):
        pixels = image if isinstance(image, Skipped) else fit(image, resolution, crop)
        if isinstance(pixels, Skipped):
            if strict:
                raise DataError(f"{name} in {source} cannot be used: {pixels.detail}; fix it or go without strict")
            skipped.append(pixels)
        else:
            write(pixels.tobytes())
            names.append(name)
        if progress is not None:
            progress(done, len(images))
    if not names:
        raise DataError(_nothing_usable(source, resolution, skipped))
    return names, dict(sorted(Counter(item.reason for item in skipped).items()))


def _nothing_usable(source: Path | str, resolution: int, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"{source} holds no files; give a folder, zip or tar with images"
    sizes = [item.size for item in skipped if item.size is not None]
    if len(sizes) == len(skipped):
        width, height = max(sizes, key=min)
        return (
            f"every image in {source} is smaller than the resolution {resolution} "
            f"(the largest is {width}x{height}); give larger images or choose a smaller resolution"
        )
    counts = Counter(item.reason for item in skipped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"{source} holds no usable image ({reasons}); the first: {skipped[0].detail}"


def _open_array(path: Path, resolution: int) -> ImageSet:
    info_path = path.with_suffix(".json")
    again = "build it again with 'hflow-rt dataset'"
    for needed in (path, info_path):
        if not needed.is_file():
            raise DataError(f"a dataset is a .npy and a .json side by side, and {needed} is missing; {again}")
    try:
        info = DatasetInfo.model_validate_json(info_path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise DataError(f"{info_path} does not describe a dataset ({where}: {first['msg']}); {again}") from error
    except OSError as error:
        raise DataError(f"cannot read {info_path}: {error.strerror or error}") from error
    if info.resolution != resolution:
        raise DataError(
            f"{path} holds images of {info.resolution} pixels and {resolution} are needed; "
            f"build one with 'hflow-rt dataset --resolution {resolution}'"
        )
    shape = (info.count, 3, resolution, resolution)
    expected = HEADER_BYTES + int(np.prod(shape, dtype=np.int64))
    try:
        size, digest = path.stat().st_size, sha256(path)
        if size != expected:
            raise DataError(f"{path} has {size} bytes where {info_path.name} asks for {expected}; {again}")
        if digest != info.sha256:
            raise DataError(f"{path} is not the file that {info_path.name} describes (sha256 differs); {again}")
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {again}") from error
    if array.shape != shape or array.dtype != np.uint8 or len(info.names) != info.count or info.count < 1:
        raise DataError(
            f"{path} holds {array.dtype} {list(array.shape)} where {info_path.name} asks for "
            f"uint8 {list(shape)} with {len(info.names)} names; {again}"
        )
    return ImageSet(np.asarray(array), info.names, info.skipped, digest)


class _Spool:
    """Bytes in memory, or in an unnamed temporary file once there are many."""

    def __init__(self) -> None:
        self._file: IO[bytes] = io.BytesIO()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not isinstance(self._file, io.BytesIO):
            self._file.close()  # what is mapped stays mapped

    def write(self, data: bytes) -> None:
        try:
            if isinstance(self._file, io.BytesIO) and self._file.tell() + len(data) > MAX_MEMORY_BYTES:
                memory, self._file = self._file, tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
                self._file.write(memory.getbuffer())
            self._file.write(data)
        except OSError as error:
            raise DataError(
                f"cannot keep the decoded images in {tempfile.gettempdir()}: {error.strerror or error}; "
                "build a file with 'hflow-rt dataset' and use that"
            ) from error

    def array(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """What was written, read-only."""
        if isinstance(self._file, io.BytesIO):
            array = np.frombuffer(self._file.getbuffer(), np.uint8).reshape(shape)
            array.flags.writeable = False
            return array
        self._file.flush()
        return np.asarray(np.memmap(self._file, np.uint8, "r", shape=shape))


def _header(count: int, resolution: int) -> bytes:
    """The first bytes of the `.npy` (format 1.0), padded to `HEADER_BYTES`."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 3, {resolution}, {resolution}), }}"
    room = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n"


def _check_settings(resolution: int, crop: Crop) -> None:
    if resolution < 1:
        raise ConfigError(f"the resolution must be at least 1, not {resolution}")
    if crop not in get_args(Crop):
        raise ConfigError(f"crop must be one of {', '.join(get_args(Crop))}, not '{crop}'")


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
