"""Images in zips and tars, and in the shards of webdataset: folders of tars. Nothing is unpacked, nothing trusted."""

from __future__ import annotations

import io
import tarfile
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from hflow_rt.data.file_names import clean, is_hidden, slashes
from hflow_rt.data.image_files import MAX_FILE_BYTES, Skipped, looks_like_image, short
from hflow_rt.data.image_source import ImageSource, of_files
from hflow_rt.errors import DataError

__all__ = ["is_tar", "open_tar", "open_zip", "tar_shards"]


def is_tar(path: Path) -> bool:
    """Whether a file is called like a tar, compressed or not."""
    return ".tar" in path.suffixes or path.suffix in {".tgz", ".tbz2", ".txz"}


@contextmanager
def open_zip(path: Path) -> Iterator[ImageSource]:
    """Its files, sorted. Raises `DataError` for a damaged one."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole zip file ({short(error)}); copy or download it again") from error
    with archive:
        named = [(slashes(member.filename), member) for member in archive.infolist()]
        files = [(name, member) for name, member in named if not name.endswith("/") and not is_hidden(name)]
        files.sort(key=lambda file: file[0])
        members = [member for _, member in files]
        sizes = [member.file_size for member in members]
        yield of_files([clean(name) for name, _ in files], sizes, lambda number: archive.open(members[number]))


@contextmanager
def open_tar(path: Path) -> Iterator[ImageSource]:
    """Its files in its order, whatever its compression, but for what stands beside an image of the same key.

    Raises `DataError` for a damaged one, and for what is none.
    """
    try:
        archive = tarfile.open(path)  # noqa: SIM115 - closed by the with below
    except Exception as error:
        if is_tar(path):
            raise DataError(f"{path} is not a whole tar file ({short(error)}); copy or download it again") from error
        raise DataError(f"{path} is neither a folder, a zip nor a tar; give one of these") from error
    with archive:
        members = _members(path, archive)
        keys = {_key(member.name) for member in members if looks_like_image(member.name)}
        members = [one for one in members if looks_like_image(one.name) or _key(one.name) not in keys]

        def opened(number: int) -> IO[bytes] | Skipped:
            return archive.extractfile(members[number]) or Skipped("unreadable", "it is not a regular file")

        yield of_files([clean(member.name) for member in members], [member.size for member in members], opened)


def tar_shards(folder: Path, shards: Sequence[str]) -> ImageSource:
    """The images in tars of a folder, called `shard.tar/member`, and found by where they begin.

    What is not called like an image belongs to one. Raises `DataError` for a damaged or compressed tar.
    """
    names: list[str] = []
    sizes, starts, of = array("q"), array("q"), array("q")
    for index, shard in enumerate(shards):
        path = folder / shard
        try:
            archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed by the with below
        except Exception as error:
            raise DataError(f"{path} is not a whole tar without compression ({short(error)}); copy it again") from error
        with archive:
            for member in _members(path, archive):
                if member.isreg() and looks_like_image(member.name):
                    names.append(f"{clean(shard)}/{clean(member.name)}")
                    sizes.append(member.size)
                    starts.append(member.offset_data)
                    of.append(index)
    if not names:
        raise DataError(f"{folder} holds tars and no image in them; give tars with .jpg, .png or the like")

    def opened(number: int) -> IO[bytes]:
        with open(folder / shards[of[number]], "rb") as file:
            file.seek(starts[number])
            data = file.read(min(sizes[number], MAX_FILE_BYTES + 1))
        if len(data) < min(sizes[number], MAX_FILE_BYTES + 1):
            raise OSError("the tar has become shorter")
        return io.BytesIO(data)

    return of_files(names, sizes, opened)


def _members(path: Path, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """The files of a whole tar. Raises `DataError`."""
    try:
        members = archive.getmembers()
        # tarfile stops without a word where a header is cut; a whole archive goes on with an empty block
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive mark")
    except Exception as error:
        raise DataError(f"{path} is a damaged or truncated tar ({short(error)}); copy or download it again") from error
    return [member for member in members if not member.isdir() and not is_hidden(member.name)]


def _key(name: str) -> str:
    """What the files of one sample have in common: the path up to the first dot of the name."""
    path = PurePosixPath(slashes(name))
    return str(path.parent / path.name.partition(".")[0])
