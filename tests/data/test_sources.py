"""Every kind of file and archive: what becomes RGB, what is skipped and why, what is refused."""

import io
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.image_files import Skipped, looks_like_image, read_file, to_rgb
from hflow_rt.data.resize import fit
from hflow_rt.data.sources import open_source
from hflow_rt.errors import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


PLAIN = png(Image.new("RGB", (8, 8), RED))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(source: Path) -> dict[str, Image.Image | Skipped]:
    with open_source(source) as images:
        found = dict(images)
        assert len(images) == len(found)
    return found


def reasons(source: Path) -> dict[str, str]:
    return {name: image.reason if isinstance(image, Skipped) else "used" for name, image in read(source).items()}


def reread(data: bytes) -> Image.Image:
    return to_rgb(Image.open(io.BytesIO(data)))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> object:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


FILES = {"b/2.png": PLAIN, "a.png": PLAIN, "b/10.png": PLAIN}


def test_folder_is_recursive_and_sorted(tmp_path: Path) -> None:
    assert list(read(write(tmp_path, FILES))) == ["a.png", "b/10.png", "b/2.png"]


def test_zip_is_sorted(tmp_path: Path) -> None:
    found = read(write_zip(tmp_path / "x.zip", FILES))
    assert list(found) == ["a.png", "b/10.png", "b/2.png"]
    assert pixel(found["b/2.png"]) == RED


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x", "w:xz"), ("x.tbz2", "w:bz2")])
def test_tar_keeps_its_order(tmp_path: Path, name: str, mode: str) -> None:
    found = read(write_tar(tmp_path / name, {f"./{key}": data for key, data in FILES.items()}, mode))
    assert list(found) == list(FILES)
    assert pixel(found["a.png"]) == RED


def test_the_first_bytes_decide_what_an_archive_is(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner", {"x.png": PLAIN}, zipfile.ZIP_STORED)
    assert reasons(inner) == {"x.png": "used"}
    outer = write_tar(tmp_path / "outer", {"a.png": PLAIN, "inner.zip": inner.read_bytes()})
    assert reasons(outer) == {"a.png": "used", "inner.zip": "not an image"}


JUNK = {
    "__MACOSX/a.png": PLAIN,
    "._a.png": PLAIN,
    ".hidden/a.png": PLAIN,
    "b/.DS_Store": b"x",
    "ok.png": PLAIN,
}


def test_hidden_and_macos_junk_is_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", JUNK)
    archives = [write_zip(tmp_path / "x.zip", JUNK), write_tar(tmp_path / "x.tar", JUNK)]
    for source in [folder, *archives]:
        assert reasons(source) == {"ok.png": "used"}


def test_bad_files_are_named_with_a_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {
        "cut.png": png(Image.fromarray(noise))[:3000],
        "empty.png": b"",
        "good.png": PLAIN,
        "notes.txt": b"hello",
        "text.png": b"this is text, whatever its name says",
    }
    expected = {
        "cut.png": "broken image",
        "empty.png": "empty file",
        "good.png": "used",
        "notes.txt": "not an image",
        "text.png": "not an image",
    }
    assert reasons(write(tmp_path / "folder", files)) == expected
    assert reasons(write_zip(tmp_path / "x.zip", files)) == expected
    assert reasons(write_tar(tmp_path / "x.tar", files)) == expected


def test_what_is_no_regular_file_is_counted_and_never_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", {"ok.png": PLAIN, "deep/ok.png": PLAIN})
    elsewhere = write(tmp_path / "elsewhere", {"other.png": PLAIN})
    (folder / "dead.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "below.png").symlink_to("ok.png/below")
    (folder / "round").symlink_to(folder)
    (folder / "others").symlink_to(elsewhere)
    (folder / "same.png").symlink_to("ok.png")
    (folder / "null").symlink_to(os.devnull)
    os.mkfifo(folder / "pipe.png")
    (folder / "to_pipe.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
        assert reasons(folder) == {
            "below.png": "broken link",
            "dead.png": "broken link",
            "deep/ok.png": "used",
            "loop.png": "broken link",
            "null": "link to a device",
            "ok.png": "used",
            "others": "link to a folder",
            "pipe.png": "named pipe",
            "round": "link to a folder",
            "same.png": "used",
            "socket.png": "socket",
            "to_pipe.png": "link to a named pipe",
        }
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        read(folder / "pipe.png")
    (tmp_path / "link").symlink_to(elsewhere)  # one that was named is followed
    assert reasons(tmp_path / "link") == {"other.png": "used"}


def test_links_inside_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": PLAIN})
    with tarfile.open(path, "a") as archive:
        for name, target in [("same.png", "a.png"), ("outside.png", "../secret.png"), ("loop.png", "loop.png")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        info = tarfile.TarInfo("pipe.png")
        info.type = tarfile.FIFOTYPE
        archive.addfile(info)
    unread = dict.fromkeys(["outside.png", "loop.png", "pipe.png"], "unreadable")
    assert reasons(path) == {"a.png": "used", "same.png": "used"} | unread


def test_names_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(PLAIN)
    assert reasons(tmp_path) == {"\\xff.png": "used"}


@pytest.mark.parametrize("factor", [0.6, 1.5])  # Pillow warns above its limit and raises above twice that
def test_decompression_bombs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, factor: float
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / 2 / factor))
    """large_image_two_answers: a file among others, or alone."""
    write(tmp_path, {"bomb.png": png(Image.new("L", (100, 100))), "ok.png": PLAIN})
    assert reasons(tmp_path) == {"bomb.png": "too large", "ok.png": "used"}
    found = read_file(tmp_path / "bomb.png")
    assert isinstance(found, Skipped)
    assert found.reason == "too large"
    assert list(recwarn) == []


def test_oversized_entries_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hflow_rt.data.image_files.MAX_FILE_BYTES", 1000)
    path = write_zip(tmp_path / "x.zip", {"zeros.png": bytes(10**6), "ok.png": PLAIN})
    assert reasons(path) == {"ok.png": "used", "zeros.png": "too large"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.JPG", True), ("b/a.webp", True), ("IMG_1.HEIC", True), ("a.txt", False), ("README", False), ("png", False)],
)
def test_names_that_look_like_images(name: str, expected: bool) -> None:
    assert looks_like_image(name) == expected


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    for kind in ("gif", "png", "webp", "tiff"):
        settings = {"lossless": True} if kind == "webp" else {}
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **settings)
    for image in read(tmp_path).values():
        assert isinstance(image, Image.Image)
        assert pixel(image) == RED


def test_a_damaged_zip_entry_is_skipped(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": PLAIN, "b.png": PLAIN}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(PLAIN) + 50] ^= 255  # its checksum no longer holds
    path.write_bytes(data)
    assert reasons(path) == {"a.png": "unreadable", "b.png": "used"}


@pytest.mark.parametrize("name", ["x.zip", "no-suffix"])
def test_truncated_zip_is_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / name, FILES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a whole zip file"):
        read(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_truncated_tar_is_refused_wherever_it_is_cut(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    pictures = {f"{i}.png": png(Image.fromarray(noise[i])) for i in range(3)}
    path = write_tar(tmp_path / "x.tar", pictures, mode)
    data = path.read_bytes()
    member = 512 + -(-len(pictures["0.png"]) // 512) * 512
    # in the first header, in data, at the edge of a member, in a later header
    for length in [100, len(data) // 3, member, member + 200, len(data) // 2]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="tar"):
            read(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.zip", b"", "not a whole zip file"),
        ("x.tar", b"", "not a whole tar file"),
        ("x.tgz", b"nonsense", "not a whole tar file"),
        ("photo.png", PLAIN, "neither a folder, a zip nor a tar"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nowhere")


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: object) -> None:  # permissions do not stop root, so the system call is made to fail
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match="Permission denied"):
        read(tmp_path)


def test_alpha_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    image = reread(png(rgba))
    assert [pixel(image, x) for x in range(3)] == [RED, (127, 127, 127), WHITE]


def test_grey_with_alpha() -> None:
    image = reread(png(Image.merge("LA", [Image.new("L", (8, 8), 90), Image.linear_gradient("L").resize((8, 8))])))
    assert pixel(image, 0, 0)[0] > 220
    assert pixel(image, 0, 7)[0] < 110


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, *RED])
    palette.putpixel((0, 0), 0)
    image = reread(png(palette))
    assert (pixel(image), pixel(image, 1)) == ((0, 0, 255), RED)
    image = reread(png(palette, transparency=0))
    assert (pixel(image), pixel(image, 1)) == (WHITE, RED)


def test_colour_key_of_an_rgb_image() -> None:
    image = Image.new("RGB", (8, 8), RED)
    image.putpixel((0, 0), (1, 2, 3))
    image = reread(png(image, transparency=(1, 2, 3)))
    assert (pixel(image), pixel(image, 1)) == (WHITE, RED)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_rgb(mode: str) -> None:
    assert pixel(reread(png(Image.new(mode, (8, 8), 255)))) == WHITE


def test_cmyk_becomes_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(buffer, "TIFF")
    assert pixel(reread(buffer.getvalue())) == WHITE


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    image = reread(png(Image.fromarray(values)))
    assert [pixel(image, x)[0] for x in range(5)] == [0, 0, 1, 128, 255]
    pgm = b"P5 2 1 65535\n" + np.array([0, 65535], dtype=">u2").tobytes()
    assert [pixel(reread(pgm), x)[0] for x in range(2)] == [0, 255]


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[7, 9]], dtype=np.uint16)
    image = reread(png(Image.fromarray(values), transparency=7))
    assert [pixel(image, x)[0] for x in range(2)] == [255, 0]


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.full((8, 8), 70000, np.int32)])
def test_pixels_without_a_range_are_skipped(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert reasons(tmp_path) == {"x.tiff": "broken image"}


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    upright = np.zeros((32, 16, 3), dtype=np.uint8)
    upright[:16] = 255  # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "x.jpg", quality=95, exif=exif)
    image = read(tmp_path)["x.jpg"]
    assert isinstance(image, Image.Image)
    assert image.size == (16, 32)
    assert pixel(image, 8, 2)[0] > 250
    assert pixel(image, 8, 29)[0] < 5


def test_center_crop_takes_the_middle() -> None:
    values = np.zeros((4, 8, 3), dtype=np.uint8)
    values[:, 2:6] = np.arange(4, dtype=np.uint8)[:, None]
    pixels = fit(Image.fromarray(values), 4)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.arange(4), (3, 4, 4)))


def test_resize_is_lanczos() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((4, 4), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    for crop in ("center", "none"):
        np.testing.assert_array_equal(fit(image, 4, crop), expected)


def test_what_does_not_fit_is_skipped() -> None:
    small = fit(Image.new("RGB", (20, 7)), 8)
    assert isinstance(small, Skipped)
    assert (small.reason, small.size) == ("too small", (20, 7))
    oblong = fit(Image.new("RGB", (20, 9)), 8, crop="none")
    assert isinstance(oblong, Skipped)
    assert oblong.reason == "not square"


SHARD = {"1.png": PLAIN, "1.cls": b"3", "1.json": b"{}", "sub/2.jpg": b"words", "2.txt": b"x", "._1.png": PLAIN}


def test_a_folder_of_tars_is_the_images_in_them(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c/a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, SHARD)
    (tmp_path / "a.parquet").write_bytes(b"what is known of the images")
    expected = {f"{tar}/{name}": why for tar in ("a.tar", "b.tar", "c/a.tar") for name, why in
                (("1.png", "used"), ("sub/2.jpg", "not an image"))}  # fmt: skip
    assert reasons(tmp_path) == expected
    with open_source(tmp_path) as source:
        assert [name for name, _ in source.part(range(3, 5))] == ["b.tar/sub/2.jpg", "c/a.tar/1.png"]
        assert [*source.listing][:2] == [("a.tar/1.png", len(PLAIN)), ("a.tar/sub/2.jpg", 5)]
        (tmp_path / "b.tar").write_bytes(b"")  # only what is asked for is read
        assert [isinstance(image, Skipped) for _, image in source] == [False, True, True, True, False, True]
    with pytest.raises(DataError, match=r"b\.tar is a damaged or truncated tar|b\.tar is not a whole tar"):
        read(tmp_path)
    assert [*reasons(tmp_path / "[ac].tar")] == ["a.tar/1.png", "a.tar/sub/2.jpg"]
    assert [*reasons(tmp_path / "*" / "*.tar")] == ["c/a.tar/1.png", "c/a.tar/sub/2.jpg"]
    assert reasons(tmp_path / "a.tar") == {"1.png": "used", "sub/2.jpg": "not an image", "2.txt": "not an image"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", {"1.json": b"{}"}, "holds tars and no image in them"),
        ("a.tar", None, r"a\.tar is not a whole tar without compression"),
        ("a.rat", None, "no file is called like"),
    ],
)
def test_folders_of_other_tars_are_refused(
    tmp_path: Path, name: str, data: dict[str, bytes] | None, message: str
) -> None:
    write_tar(tmp_path / name, data or FILES, "w" if data else "w:gz")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "*.tar")
