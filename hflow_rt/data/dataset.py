"""Images as one uint8 array `[N, C, R, R]`: built once into a `.npy` file, or decoded on the fly.

A dataset is two files, see `DatasetInfo`: `NAME.npy` and `NAME.json`, which says where it came from and holds the hash
that proves the array is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Self, get_args

import numpy as np
from numpy.typing import NDArray

from hflow_rt.data.image_files import Skipped, looks_like_image
from hflow_rt.data.image_source import ImageSource
from hflow_rt.data.packed import HEADER_BYTES, DatasetInfo, array_header, is_packed, map_array, read_info
from hflow_rt.data.resize import Crop, fit
from hflow_rt.data.sources import open_source
from hflow_rt.data.splits import Split, split_names
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.files import atomic_file, sha256

__all__ = ["DatasetInfo", "ImageSet", "Progress", "build_dataset", "open_dataset"]

Progress = Callable[[int, int], None]

# Images decoded on the fly stay in memory up to this many bytes, then move to a temporary file.
MAX_MEMORY_BYTES = 2**30


class ImageSet:
    """Images in a fixed order.

    `hash` changes with any name, pixel or the order, and is the same for the same images whether they come
    from a folder, a zip or a `.npy` built of it. `skipped` counts by reason the files of the source not used;
    `unused` gives the name and the reason of those that are or look like images.
    """

    def __init__(
        self,
        array: NDArray[np.uint8],
        names: list[str],
        skipped: dict[str, int],
        array_sha256: str,
        unused: Mapping[str, str] | None = None,
    ) -> None:
        self._array = array
        self.names = names
        self.skipped = skipped
        self.unused = dict(unused or {})
        self.hash = hashlib.sha256(json.dumps([names, array_sha256]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def resolution(self) -> int:
        """Side of every image in pixels."""
        return int(self._array.shape[-1])

    def pixels(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """The images at `indices` (any order, repeats allowed) as a new uint8 array `[n, C, R, R]`."""
        return self._array[np.asarray(indices, dtype=np.int64)]

    @cached_property
    def _split(self) -> Split:
        return split_names(self.names)

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the images to train on, and of those held out; both ascending. See `split_names`."""
        return self._split.training, self._split.held_out

    @property
    def split_by(self) -> str:
        """How many images are on each side and what decided it: the folders, or a hash of the names."""
        return str(self._split)

    @property
    def left_out(self) -> str:
        """`unused` counted in words such as "2 empty file, 1 too small"; empty if everything is used."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(self.unused.values()).items()))


def build_dataset(
    source: Path | str,
    output: Path | str,
    resolution: int,
    crop: Crop = "center",
    strict: bool = False,
    progress: Progress | None = None,
    channels: int = 3,
) -> DatasetInfo:
    """Decode a folder, zip, tar or array into `output` (`.npy`, uint8 `[N, C, R, R]`) and its `.json`, atomically.

    channels: C, 3 or 1 for luminance.
    `strict` refuses the first file that cannot be used instead of skipping it; `progress` is called with the
    files done and the files in all. Raises `DataError` (nothing usable, unreadable, unwritable, or a file of the user's
    would be replaced) or `ConfigError`.
    """
    source, output = Path(source), Path(output)
    if output.suffix != ".npy":
        raise ConfigError(f"the dataset file must end in .npy, not '{output.name}'")
    _check_settings(resolution, crop, channels)
    _check_output(source, output)
    with (
        open_source(source) as images,  # first, so that a wrong source leaves no new folder behind
        atomic_file(output.with_suffix(".json")) as info_file,
        atomic_file(output) as array_file,  # last, so renamed first: the JSON never vouches for a missing array
    ):
        with open(array_file, "wb") as sink:
            sink.write(bytes(HEADER_BYTES))
            names, skipped, unused = _decode(images, source, resolution, channels, crop, strict, progress, sink.write)
            sink.seek(0)
            sink.write(array_header((len(names), channels, resolution, resolution)))
        info = DatasetInfo(
            source=str(source),
            count=len(names),
            resolution=resolution,
            channels=1 if channels == 1 else 3,
            crop=crop,
            sha256=sha256(array_file),
            skipped=skipped,
            unused=unused,
            names=names,
        )
        info_file.write_text(json.dumps(info.model_dump(), indent=1) + "\n")
    return info


def open_dataset(
    source: Path | str,
    resolution: int,
    crop: Crop = "center",
    progress: Progress | None = None,
    channels: int = 3,
) -> ImageSet:
    """A `.npy` written by `build_dataset` (mapped, checked against its hash), or a folder, zip, tar or other array.

    The latter are decoded into memory, above 1 GiB into a temporary file that vanishes with the process, and so is a
    dataset of other `channels`: 3, or 1 for grey, which is the luminance of colours.
    `crop` concerns only these: a dataset is square already. Raises `DataError` or `ConfigError`.
    """
    _check_settings(resolution, crop, channels)
    path = Path(source)
    if is_packed(path):
        info = read_info(path)
        if info.resolution != resolution:
            raise DataError(
                f"{path} holds images of {info.resolution} pixels and {resolution} are needed; "
                f"build one with 'hflow-rt dataset --resolution {resolution}'"
            )
        if info.channels == channels:
            return ImageSet(map_array(path, info), info.names, info.skipped, info.sha256, info.unused)
    with open_source(path) as images, _Spool() as spool:
        names, skipped, unused = _decode(images, path, resolution, channels, crop, False, progress, spool.write)
        array = spool.array((len(names), channels, resolution, resolution))
    digest = hashlib.sha256(array_header(array.shape))  # the hash that the .npy of these images would have
    digest.update(array.reshape(-1).data)
    return ImageSet(array, names, skipped, digest.hexdigest(), unused)


def _decode(
    images: ImageSource,
    source: Path,
    resolution: int,
    channels: int,
    crop: Crop,
    strict: bool,
    progress: Progress | None,
    write: Callable[[bytes], object],
) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """Hand each usable image's pixels to `write`; their names, and `skipped` and `unused` as of `DatasetInfo`."""
    names: list[str] = []
    unused: dict[str, str] = {}
    skipped: list[Skipped] = []
    for done, (name, image) in enumerate(images, 1):
        pixels = image if isinstance(image, Skipped) else fit(image, resolution, crop, channels)
        if isinstance(pixels, Skipped):
            if strict:
                raise DataError(f"{name} in {source} cannot be used: {pixels.detail}; fix it or go without strict")
            skipped.append(pixels)
            if pixels.reason not in ("not an image", "empty file") or images.only_images or looks_like_image(name):
                unused[name] = pixels.reason
        else:
            write(pixels.tobytes())
            names.append(name)
        if progress is not None:
            progress(done, len(images))
    if not names:
        raise DataError(_nothing_usable(source, resolution, skipped))
    return names, dict(sorted(Counter(item.reason for item in skipped).items())), unused


def _nothing_usable(source: Path, resolution: int, skipped: list[Skipped]) -> str:
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
    first = next((item for item in skipped if item.reason != "not an image"), skipped[0])
    return f"{source} holds no usable image ({reasons}); the first: {first.detail}"


def _check_output(source: Path, output: Path) -> None:
    """Raise `DataError` if a dataset there would replace its source, or a `.json` that describes something else."""
    description = output.with_suffix(".json")
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
        raise DataError(f"a dataset cannot be written over its own source {source}; choose another name")
    if os.path.lexists(description):
        try:
            read_info(output)
        except DataError as error:
            raise DataError(
                f"{description} describes no dataset and would be replaced by the description of {output}; "
                "choose another name, or move that file"
            ) from error
    elif os.path.isfile(output) and Path(os.path.realpath(source)) in Path(os.path.realpath(output)).parents:
        raise DataError(f"{output} is a file of its source {source} and would be replaced; choose another name")


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


def _check_settings(resolution: int, crop: Crop, channels: int) -> None:
    if resolution < 1:
        raise ConfigError(f"the resolution must be at least 1, not {resolution}")
    if channels not in (1, 3):
        raise ConfigError(f"channels must be 3, or 1 for grey, not {channels}")
    if crop not in get_args(Crop):
        raise ConfigError(f"crop must be one of {', '.join(get_args(Crop))}, not '{crop}'")
