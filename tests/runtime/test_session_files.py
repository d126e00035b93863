"""Sessions and files: what is read as a model takes it, what is written, and what a session says of itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hflow_rt
from hflow_rt.errors import BundleError, DataError
from hflow_rt.runtime import Session, load
from hflow_rt.runtime.images.pictures import grid, to_uint8

R = 16


@pytest.fixture(scope="module")
def session(tiny_run: Path) -> Session:
    return load(tiny_run)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(name: str, width: int = 40, height: int = 24, colour: str = "teal") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (width, height), "white")
    image.paste(colour, (width // 2 - height // 2, 0, width // 2 + height // 2, height))  # the square in the middle
    image.save(name)
    return name


def test_read(session: Session) -> None:
    found = session.read(picture("a.png"), Path(picture("b.jpg", 16, 16, "red")))
    assert found.shape == (2, 3, R, R)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], np.float32([0, 128, 128])[:, None, None].repeat(R, 1).repeat(R, 2) / 255)
    assert session.inverse(found).log_prob.shape == (2,)


def test_read_folders_and_what_cannot_be_read(session: Session) -> None:
    for name in ("photos/1.png", "photos/2.png"):
        picture(name)
    assert session.read("photos").shape == (2, 3, R, R)
    Path("photos/3.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="2 images in photos; not used: 1 not an image") as caught:
        session.read("photos")
    assert caught[0].filename == __file__
    with pytest.raises(DataError, match=r"no image at nothing\.png"):
        session.read("nothing.png")
    with pytest.raises(DataError, match="no images given"):
        session.read()


def test_save_one_image_as_it_is(session: Session) -> None:
    images = session.sample(1, seed=2)
    session.save(images, "one.png")
    np.testing.assert_array_equal(session.read("one.png"), (to_uint8(images) / np.float32(255)).transpose(0, 3, 1, 2))
    session.save(torch.from_numpy(images), "same.png")
    assert Path("one.png").read_bytes() == Path("same.png").read_bytes()


def test_save_a_sheet_or_a_folder(session: Session) -> None:
    images = session.sample(3)
    session.save(images, "sheet.png")
    with Image.open("sheet.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), np.asarray(grid(to_uint8(images))))
    session.save(images, "many")
    session.save(images, "many")  # files of ours
    assert sorted(path.name for path in Path("many").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert len(session.read("many")) == 3


def test_save_refuses(session: Session) -> None:
    images = session.sample(1)
    Path("link.png").symlink_to("/dev/null")
    for name, reason in (("a.txt", "must end in"), ("link.png", "it is a device"), ("-", "name a file")):
        with pytest.raises(DataError, match=reason):
            session.save(images, name)
    with pytest.raises(DataError, match=r"float \[B, 3 or 1, R, R\]"):
        session.save(images[0], "a.png")
    picture("mine/000000.png")
    with pytest.raises(DataError, match="exists, was not written by hflow-rt"):
        session.save(images, "mine")
    assert sorted(path.name for path in Path().iterdir()) == ["link.png", "mine"]


def test_repr(session: Session, tiny_run: Path) -> None:
    assert repr(session) == (
        "<Session: hflow 16x16 on onnxruntime CPUExecutionProvider, verified\n"
        " latents end0 [2, 1, 1], end1 [6, 1, 1], z1 [4, 8, 8], z0 [3, 16, 16]>"
    )
    shutil.copytree(tiny_run / "bundle", "bundle")
    manifest = Path("bundle/manifest.json")
    manifest.write_text(manifest.read_text().replace('"verified": true', '"verified": false'))
    assert "on torch cpu, UNVERIFIED\n" in repr(load("bundle", "torch", "cpu"))


def test_sample_passes_on_class_and_controls(session: Session) -> None:
    np.testing.assert_array_equal(session.sample(2, seed=3, controls={}), session.sample(2, seed=3))
    with pytest.raises(DataError, match="unknown control 'nothing' of this hflow model; it has none"):
        session.sample(1, controls={"nothing": 1.0})
    with pytest.raises(DataError, match="knows no classes; omit 'boot'"):
        session.sample(1, option="boot")


def test_load_without_a_path_is_the_bundled_model() -> None:
    with hflow_rt.load(device="cpu") as session:
        assert session.bundle.path == hflow_rt.pretrained()


def test_what_is_no_bundle_yet_names_the_command(tiny_run: Path) -> None:
    shutil.copytree(tiny_run, "run", ignore=shutil.ignore_patterns("bundle"))
    Path("published.bin").write_bytes(bytes(1000))
    for path, command in (
        ("run", "hflow-rt export run"),
        ("run/model.safetensors", "hflow-rt export run/model.safetensors"),
        ("published.bin", "hflow-rt import published.bin"),
    ):
        for backend in ("onnx", "torch"):
            with pytest.raises(BundleError, match=f"run '{command}' first$"):
                load(path, backend)
