"""The recipe of the training images, on a small tarball of the same kind."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.assets import demo_images
from hflow_rt.assets.fluent import build, split_of
from hflow_rt.errors import DataError

NAMES = ["1f600.webp", "1f9d9-1f3fb.webp", "1f335.webp", "0039-fe0f-20e3.webp"]  # train, train, test, kept back


def tarball(path: Path, names: list[str], size: tuple[int, int] = (256, 256)) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for index, name in enumerate(names):
            pixels = np.zeros((size[1], size[0], 4), np.uint8)
            pixels[64:192, 64:192] = (40 * index, 200, 90, 255)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "WEBP", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{name}")
            member.size = content.tell()
            archive.addfile(member, io.BytesIO(content.getvalue()))
    return path


def test_split_and_pixels(tmp_path: Path) -> None:
    counts = build(tarball(tmp_path / "in.tgz", NAMES), tmp_path / "out.zip")
    assert counts == {"train": 2, "test": 1}
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["test/1f335.webp", "train/1f600.webp", "train/1f9d9-1f3fb.webp"]
        picture = np.asarray(Image.open(archive.open("train/1f600.webp")))
    assert picture.shape == (64, 64, 3)
    assert (picture[32, 32] == (0, 200, 90)).all()
    assert (picture[4, 4] == 255).all()
    build(tmp_path / "in.tgz", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


def test_a_tall_picture_stands_in_the_middle(tmp_path: Path) -> None:
    build(tarball(tmp_path / "in.tgz", NAMES, (256, 320)), tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        green = np.asarray(Image.open(archive.open("train/1f600.webp")))[:, :, 0] < 128
    columns = np.nonzero(green.any(0))[0]
    assert columns[0] + columns[-1] == 63
    assert len(columns) == 26  # 128 of 320 pixels


def test_the_split_is_that_of_the_images_that_ship() -> None:
    with zipfile.ZipFile(demo_images()) as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp")]
    assert len(names) == 705
    assert all(split_of(name.partition("/")[2]) == name.partition("/")[0] for name in names)


def test_relatives_stay_together() -> None:
    assert {split_of(f"1f335{rest}.webp") for rest in ("", "-1f3fb", "-1f3fb-200d-2640-fe0f")} == {"test"}


@pytest.mark.parametrize("content", [b"", b"no tarball", None])
def test_not_the_tarball(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "in.tgz"
    if content is None:
        tarball(path, NAMES[:1])
    else:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        build(path, tmp_path / "out.zip")
    assert "download it again" in str(caught.value)
    assert not (tmp_path / "out.zip").exists()


def test_as_a_command(tmp_path: Path) -> None:
    source, output = tarball(tmp_path / "in.tgz", NAMES), tmp_path / "out.zip"
    command = [sys.executable, "-m", "hflow_rt.assets.fluent"]
    done = subprocess.run([*command, source, output], capture_output=True, text=True, check=True)
    assert done.stdout == f"{output}: 2 training and 1 test images\n"
    failed = subprocess.run([*command, tmp_path / "none", output], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {tmp_path / 'none'} is not a whole tarball")
