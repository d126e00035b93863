"""Pictures: exact rounding, honest reading, grids with every pixel in place."""

import numpy as np
import pytest
from PIL import Image

from hflow_rt.errors import DataError
from hflow_rt.runtime.images.pictures import (
    Row,
    captioned,
    check_pixels,
    from_uint8,
    grid,
    heat_colours,
    labelled_rows,
    read_image,
    save_image,
    strip,
    table,
    to_uint8,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(image):
    """float32 `[3, R, R]` of `read_image` as uint8 `[R, R, 3]`."""
    assert image.dtype == np.float32
    return to_uint8(image[None])[0]


def test_every_level_survives_the_trip():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = from_uint8(levels)
    assert floats.dtype == np.float32
    assert floats.shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(floats[0, 0].ravel(), np.arange(256, dtype=np.float32) / np.float32(255))
    np.testing.assert_array_equal(to_uint8(floats), levels)


def test_channels_stay_channels():
    images = noise(2, 4, 5, 3)
    np.testing.assert_array_equal(from_uint8(images)[1, 2], images[1, :, :, 2].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("value", "level"),
    [(0.49 / 255, 0), (0.51 / 255, 1), (99.4 / 255, 99), (99.6 / 255, 100), (-0.1, 0), (1.1, 255)],
)
def test_values_are_rounded_and_clipped(value, level):
    for dtype in (np.float32, np.float64):
        assert (to_uint8(np.full((1, 3, 2, 2), value, dtype)) == level).all()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 4, 4), np.float32),
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.full((1, 3, 4, 4), np.nan, np.float32),
        np.full((1, 3, 4, 4), np.inf, np.float32),
    ],
)
def test_to_uint8_refuses(images):
    with pytest.raises(DataError, match=r"images must be float \[B, 3 or 1, R, R\]|pixels must be finite"):
        to_uint8(images)


@pytest.mark.parametrize(
    "images", [noise(4, 4, 3), noise(1, 4, 4, 4), noise(1, 4, 4, 3).astype(np.float32), noise(0, 4, 4, 3)]
)
@pytest.mark.parametrize("function", [check_pixels, from_uint8, grid, strip])
def test_pixels_of_another_kind_are_refused(function, images):
    with pytest.raises(DataError, match=r"images must be uint8 \[B, H, W, 3 or 1\] and not empty; found"):
        function(images)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_lossless_round_trip_through_a_file(tmp_path, suffix):
    image = noise(16, 16, 3)
    path = tmp_path / f"a{suffix}"
    save_image(path, Image.fromarray(image))
    np.testing.assert_array_equal(pixels(read_image(path, 16)), image)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_jpeg_is_close(tmp_path):
    image = np.asarray(Image.fromarray(noise(4, 4, 3)).resize((32, 32), Image.Resampling.BICUBIC))
    save_image(tmp_path / "a.jpg", Image.fromarray(image))
    assert np.abs(pixels(read_image(tmp_path / "a.jpg", 32)).astype(int) - image).mean() < 4


def test_save_errors(tmp_path):
    image = Image.new("RGB", (4, 4))
    for name in ("a.tiff", "a"):
        with pytest.raises(DataError, match=rf"must end in \.png, \.jpg, \.jpeg, \.webp; found '{name}'"):
            save_image(tmp_path / name, image)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        save_image(tmp_path / "file" / "a.png", image)


def test_the_centre_is_cropped(tmp_path):
    for size, box in (((12, 4), (4, 0)), ((4, 12), (0, 4))):
        picture = Image.new("RGB", size, RED)
        picture.paste(Image.new("RGB", (4, 4), BLUE), box)
        picture.save(tmp_path / "a.png")
        assert (pixels(read_image(tmp_path / "a.png", 4)) == BLUE).all()


def test_large_images_are_filtered_down(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # nearest neighbours would yield black or white
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inner = pixels(read_image(tmp_path / "a.png", 16))[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 127).max() < 8


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[:, 2:, 3] = 255
    rgba[0, 0, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    seen = pixels(read_image(tmp_path / "a.png", 4))
    assert (seen[1:, :2] == WHITE).all()
    assert (seen[:, 2:] == RED).all()
    np.testing.assert_allclose(seen[0, 0], [255, 127, 127], atol=1)


def test_transparent_palette_and_grey(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "p.png", 2)), [[WHITE, BLUE], [BLUE, WHITE]])
    Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8)).save(tmp_path / "g.png")
    grey = pixels(read_image(tmp_path / "g.png", 2))
    np.testing.assert_array_equal(grey, np.array([[0, 100], [200, 255]])[..., None].repeat(3, 2))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    deep = (np.array([[0, 100], [200, 255]]) * 257).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "a.png", 2))[..., 0], [[0, 100], [200, 255]])


def test_exif_orientation_is_obeyed(tmp_path):
    picture = Image.new("RGB", (16, 16), RED)
    picture.paste(Image.new("RGB", (16, 8), BLUE), (0, 0))  # blue above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: blue right
    picture.save(tmp_path / "a.png", exif=exif)
    seen = pixels(read_image(tmp_path / "a.png", 16))
    assert (seen[:, 8:] == BLUE).all()
    assert (seen[:, :8] == RED).all()


def test_unreadable_images_are_one_line(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match="no image at"):
        read_image(path, 8)
    with pytest.raises(DataError, match="no image at"):
        read_image(tmp_path, 8)
    Image.fromarray(noise(32, 32, 3)).save(path)
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a whole image of a known kind") as caught:
            read_image(path, 8)
        assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(8, 20, 3)).save(path)
    with pytest.raises(DataError, match="it is 20x8, smaller than 16"):
        read_image(path, 16)
    with pytest.raises(DataError, match="it is 20x8 and cropping is off"):
        read_image(path, 8, crop="none")
    with pytest.raises(DataError, match="'center' or 'none'; found 'top'"):
        read_image(path, 8, crop="top")
    Image.fromarray(noise(8, 8, 3)).save(path)
    assert read_image(path, 8, crop="none").shape == (3, 8, 8)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, None, 1), (5, None, 2), (9, None, 3), (5, 2, 3), (3, 8, 1)])
def test_a_grid_holds_every_image_on_white(count, columns, rows):
    images = noise(count, 4, 6, 3)
    seen = np.asarray(grid(images, columns, padding=3, scale=2))
    across = min(count, columns or int(np.ceil(np.sqrt(count))))
    assert seen.shape == (rows * 11 + 3, across * 15 + 3, 3)
    left = np.full(seen.shape, 255, np.uint8)
    for index in range(count):
        top, start = 3 + index // across * 11, 3 + index % across * 15
        cell = seen[top : top + 8, start : start + 12]
        np.testing.assert_array_equal(cell[::2, ::2], images[index])
        np.testing.assert_array_equal(cell[1::2, 1::2], images[index])
        left[top : top + 8, start : start + 12] = cell
    np.testing.assert_array_equal(seen, left)  # all the rest is white


@pytest.mark.parametrize(("side", "scale"), [(8, 12), (64, 2), (96, 1), (128, 1), (50, 2)])
def test_small_images_are_enlarged_to_be_seen(side, scale):
    assert grid(noise(1, side, side, 3), padding=0).size == (side * scale, side * scale)


def test_a_strip_is_one_row():
    images = noise(5, 4, 4, 3)
    assert strip(images, padding=1, scale=1).size == (26, 6)


@pytest.mark.parametrize("settings", [{"columns": 0}, {"padding": -1}, {"scale": 0}])
def test_grid_counts_out_of_range(settings):
    with pytest.raises(DataError, match="a grid needs columns >= 1, padding >= 0 and scale >= 1; found"):
        grid(noise(2, 4, 4, 3), **settings)


def test_labelled_rows_put_words_beside_strips():
    rows = [("images", noise(4, 8, 8, 3)), ("a longer label", noise(2, 8, 8, 3))]
    seen = np.asarray(labelled_rows(rows))
    strips = [np.asarray(strip(images)) for _, images in rows]
    margin = seen.shape[1] - strips[0].shape[1]
    height = strips[0].shape[0]
    assert seen.shape[0] == 2 * height
    np.testing.assert_array_equal(seen[:height, margin:], strips[0])
    np.testing.assert_array_equal(seen[height:, margin : margin + strips[1].shape[1]], strips[1])
    ink = [(label < 128).any(2).any(0).nonzero()[0] for label in (seen[:height, :margin], seen[height:, :margin])]
    assert all(columns.size for columns in ink)
    assert all(columns.min() >= 4 and columns.max() < margin - 4 for columns in ink)  # nothing is cut off
    assert ink[1].min() < ink[0].min()
    with pytest.raises(DataError, match="at least one row"):
        labelled_rows([])


def ink(picture):
    """Rows and columns of the black pixels."""
    return [axis.nonzero()[0] for axis in ((picture < 100).all(2).any(1), (picture < 100).all(2).any(0))]


def test_captions_stand_under_their_images():
    images = np.full((3, 48, 48, 3), 200, np.uint8)
    seen = np.asarray(captioned(images, ["first", "", "third\nline"], columns=3, scale=2))
    bare = np.asarray(strip(images, scale=2))
    np.testing.assert_array_equal(seen[: bare.shape[0]], bare)
    assert seen.shape[1] == bare.shape[1]
    words = seen[bare.shape[0] :]
    assert (words[-2:] == 255).all()  # nothing is cut off below
    for index, lines in enumerate([1, 0, 2]):
        cell = words[:, 2 + index * 98 : 2 + index * 98 + 96]
        rows, columns = ink(cell)
        assert (rows.size > 0) == (lines > 0)
        if lines:
            assert abs(columns.min() + columns.max() - 95) < 8  # in the middle
            assert (rows.max() > len(cell) / 2) == (lines == 2)


def test_a_captioned_grid_without_words_is_the_grid():
    images = noise(5, 8, 8, 3)
    for columns in (None, 2, 9):
        # rows of a table stand one padding further apart than those of a grid
        seen, plain = (np.asarray(p) for p in (captioned(images, [""] * 5, columns), grid(images, columns)))
        assert seen.shape[1] == plain.shape[1]
        np.testing.assert_array_equal(seen[:100], plain[:100])


def test_words_too_long_for_their_place_are_cut():
    images = np.full((2, 96, 96, 3), 200, np.uint8)
    long = "a file name that never seems to end, whatever one does about it, and so on"
    seen = np.asarray(table([Row(images, long, [long, long])]))
    left = seen.shape[1] - np.asarray(strip(images)).shape[1]
    assert 100 < left < 300
    for start, stop in ((0, left), (left, left + 98), (left + 98, seen.shape[1])):
        columns = ink(seen[:, start:stop])[1]
        assert columns.size
        assert columns.min() >= 1
        assert columns.max() < stop - start - 1


def test_a_table_aligns_rows_of_different_lengths():
    rows = [Row(noise(1, 96, 96, 3)), Row(noise(3, 96, 96, 3), "three", ["a"])]
    seen = np.asarray(table(rows))
    margin = seen.shape[1] - (3 * 98 + 2)
    assert margin > 16
    np.testing.assert_array_equal(seen[2:98, margin + 2 : margin + 98], rows[0].images[0])
    np.testing.assert_array_equal(seen[102:198, margin + 2 : margin + 98], rows[1].images[0])
    assert (seen[:100, margin + 100 :] == 255).all()


def test_captions_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 images cannot have 3 captions"):
        table([Row(noise(2, 4, 4, 3), "", ["a", "b", "c"])])
    for captions, columns in ((["a"], None), (["a", "b"], 0)):
        with pytest.raises(DataError, match="needs columns >= 1 and a caption for each image; found"):
            captioned(noise(2, 4, 4, 3), captions, columns)
    with pytest.raises(DataError, match="at least one row"):
        table([])


def test_heat_colours_grow_lighter():
    values = np.linspace(0, 1, 65)
    colours = heat_colours(values)
    assert colours.shape == (65, 3)
    assert colours.dtype == np.uint8
    lightness = colours.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    np.testing.assert_array_equal(heat_colours(np.array([[-1.0, 2.0]])), [[colours[0], colours[-1]]])


def test_square_grids_stay_as_large_as_a_screen() -> None:
    small, many = np.zeros((4, 32, 32, 3), np.uint8), np.zeros((1000, 32, 32, 3), np.uint8)
    assert grid(small).size == (2 * 98 + 2, 2 * 98 + 2)
    assert grid(many).size == (32 * 66 + 2, 32 * 66 + 2)
    assert grid(many[:60], columns=60).size[0] == 60 * 98 + 2  # rows that were asked for are as they always are


def test_grey_images_make_grey_pictures() -> None:
    """A table is coloured once one of its images is; every letter and pixel is then where it would be."""
    images = noise(2, 16, 16, 1)
    for picture in (grid(images), strip(images), labelled_rows([("a", images)]), captioned(images, ["a", "b"])):
        assert picture.mode == "L"
    assert grid(images, padding=0, scale=1, columns=2).tobytes() == np.concatenate([*images[..., 0]], 1).tobytes()
    colour = noise(2, 16, 16, 3)
    mixed = labelled_rows([("grey", images), ("colour", colour)])
    assert mixed.mode == "RGB"
    same = labelled_rows([("grey", np.repeat(images, 3, -1)), ("colour", colour)])
    assert mixed.tobytes() == same.tobytes()
