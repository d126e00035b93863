"""Animations are decoded again: frame counts, times, colours."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.runtime.images.video import SUFFIXES, save_animation


def clip(count=7, height=32, width=48):
    """Big blocks of colour that move, so that lossy formats keep them: uint8 `[count, height, width, 3]`."""
    blocks = np.random.default_rng(1).integers(30, 226, (2, 3, 3), dtype=np.uint8)
    whole = blocks.repeat(-(-height // 2), 0).repeat(-(-width // 3), 1)[:height, :width]
    return np.stack([np.roll(whole, 4 * index, axis=1) for index in range(count)])


def decode(path):
    """RGB frames and their milliseconds, by Pillow."""
    with Image.open(path) as file:
        assert file.info.get("loop", 0) == 0
        pairs = []
        for frame in ImageSequence.Iterator(file):
            pixels = np.asarray(frame.convert("RGB"))  # loads the frame, and only then its duration is known
            pairs.append((pixels, frame.info["duration"]))
    return np.stack([frame for frame, _ in pairs]), [duration for _, duration in pairs]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [24, 10, 7.5])
def test_gif_and_webp_hold_every_frame(tmp_path, suffix, fps):
    frames = clip()
    path = tmp_path / f"a{suffix}"
    save_animation(path, frames, fps)
    seen, durations = decode(path)
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 4
    unit = 10 if suffix == ".gif" else 1
    assert abs(sum(durations) - 7000 / fps) <= unit / 2
    assert max(durations) - min(durations) <= unit
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_without_change_only_last_longer(tmp_path, suffix):
    frames = np.concatenate([clip(1).repeat(3, axis=0), clip(2)[1:]])
    save_animation(tmp_path / f"a{suffix}", frames, 10)
    _, durations = decode(tmp_path / f"a{suffix}")
    assert sum(durations) == 400


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_frame_is_enough(tmp_path, suffix):
    save_animation(tmp_path / f"a{suffix}", clip(1), 10)
    assert (tmp_path / f"a{suffix}").stat().st_size > 0


@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 47)])
def test_mp4_holds_every_frame(tmp_path, height, width):
    av = pytest.importorskip("av", reason="PyAV (hflow-rt[video]) is not installed")
    frames = clip(7, height, width)
    save_animation(tmp_path / "a.mp4", frames, 24)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 24
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert seen.shape == (7, 32, 48, 3)
    assert np.abs(seen[:, :height, :width].astype(int) - frames).mean() < 6  # colour edges blur in 4:2:0
    assert np.abs(seen[0, 4:12, 4:12].astype(int) - frames[0, 4:12, 4:12]).max() <= 5
    if width < 48:  # what was added repeats its neighbours
        assert np.abs(seen[:, :, -1].astype(int) - seen[:, :, -2]).mean() < 4
        assert np.abs(seen[:, -1].astype(int) - seen[:, -2]).mean() < 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_grey_frames_stay_grey(tmp_path, suffix):
    frames = clip()[..., :1]
    save_animation(tmp_path / f"a{suffix}", frames, 10)
    seen, _ = decode(tmp_path / f"a{suffix}")
    assert len(seen) == len(frames)
    assert np.abs(seen.astype(int) - frames).mean() < (0.01 if suffix == ".gif" else 3)
    assert np.abs(np.diff(seen.astype(int), axis=-1)).max() <= (0 if suffix == ".gif" else 4)


def test_png_is_a_strip(tmp_path):
    frames = clip(3, 96, 96)
    save_animation(tmp_path / "a.png", frames, 10)
    with Image.open(tmp_path / "a.png") as file:
        seen = np.asarray(file)
    assert seen.shape == (100, 3 * 98 + 2, 3)
    np.testing.assert_array_equal(seen[2:98, 100:196], frames[1])


@pytest.mark.parametrize("name", ["a.avi", "a", "gif"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"must end in \.gif, \.webp, \.mp4, \.png; found '{name}'"):
        save_animation(tmp_path / name, clip(), 10)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fps_out_of_range(tmp_path, suffix, fps):
    with pytest.raises(DataError, match="frames per second; found"):
        save_animation(tmp_path / f"a{suffix}", clip(), fps)


def test_gif_cannot_be_faster_than_50(tmp_path):
    with pytest.raises(DataError, match=r"\.gif needs 0\.1 \.\. 50 frames per second; found 60"):
        save_animation(tmp_path / "a.gif", clip(), 60)


@pytest.mark.parametrize("frames", [clip()[:0], clip()[0], clip().astype(np.float32), clip()[..., :2]])
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(DataError, match=r"frames must be uint8 \[B, H, W, 3 or 1\] and not empty"):
        save_animation(tmp_path / "a.gif", frames, 10)


def test_mp4_without_pyav_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'hflow-rt\[video\]'"):
        save_animation(tmp_path / "a.mp4", clip(), 10)
    assert list(tmp_path.iterdir()) == []


def test_mp4_without_an_encoder_says_so(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV (hflow-rt[video]) is not installed")
    monkeypatch.setattr("hflow_rt.runtime.images.video._ENCODERS", ("no-such-encoder",))
    with pytest.raises(BackendUnavailable, match=r"needs an H\.264 encoder \(no-such-encoder\)"):
        save_animation(tmp_path / "a.mp4", clip(), 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_place_that_cannot_be_written(tmp_path, suffix):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        save_animation(tmp_path / "file" / f"a{suffix}", clip(), 10)
