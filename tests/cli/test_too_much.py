"""Numbers too large for any machine, and what does not fit into this one: one line before memory is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused, tree

from hflow_rt import memory

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("train", "--set", "training.seed=18446744073709551616"), "training.seed"),
        (("train", "--set", "training.seed=-1"), "training.seed"),
        (("train", "--set", "training.batch_size=100000000000"), "training.batch_size"),
        (("train", "--set", "training.batch_size=1000000000"), "training.batch_size=1000000000 would take"),
        (("train", "--set", "model.levels.0.encoder_channels=100000000"), "model.levels.0.encoder_channels"),
        (("train", "--set", "model.levels.0.decoder_channels=60000"), "parameters would take"),
        (
            ("train", "--preset", "glow-demo", "--set", "model.hidden_channels=16384", "--set", "model.steps=64"),
            "take",
        ),
        (("train", "--minutes", "inf"), "--minutes must be > 0 and finite"),
        (("train", "--minutes", "nan"), "--minutes must be > 0 and finite"),
        (("eval", "bpd", "--seed", -1, "--limit", 2), "seed must be in 0 .. 2^64 - 1; found -1"),
        (("eval", "bpd", "--seed", 2**64, "--limit", 2), "seed must be in 0 .. 2^64 - 1"),
        (("eval", "bpd", "--draws", 10**12), "the number of draws must be at most"),
        (("eval", "bpd", "--batch", 10**12), "the batch must be at most"),
        (("sample", "-n", 10**30), "the number of images must be at most"),
        (("sample", "-n", 10**9), "a picture of"),
        (("sample", "--batch", 10**30), "the batch must be at most"),
        (("sample", "--first", 2**64), "image index must be in 0 .. 2^64 - 1"),
        (("interpolate", "--frames", 10**12), "the number of frames must be at most"),
        (("interpolate", "--frames", 10**9), "PNG pictures end at 2,147,483,647 pixels a side"),
        (("walk", "--frames", 10**30), "must be at most"),
        (("walk", "--rows", 10**6, "--columns", 10**6), "a .webp ends at 16,383 pixels a side"),
        (("heatmap", "--draws", 10**12), "the number of redraws must be at most"),
        (("heatmap", "-n", 10**9), "PNG pictures end at 2,147,483,647 pixels a side"),
        (("zeroing", "--samples", "-n", 10**9), "PNG pictures end at 2,147,483,647 pixels a side"),
        (("temperature", "-n", 10**12), "PNG pictures end at 2,147,483,647 pixels a side"),
        (("neighbours", "-k", 10**30), "PNG pictures end at 2,147,483,647 pixels a side"),
        (("seeds", "0-3", "--columns", 10**30), "the number of columns must be at most"),
        (("bench", "--rounds", 10**30), "--rounds must be at most"),
        (("bench", "--batch", 10**30), "--batch must be at most"),
        (("tune", "--batch", 10**30), "--batch must be at most"),
    ],
)
def test_number_too_large(hflow: Command, run: Path, arguments: tuple[object, ...], setting: str) -> None:
    before = tree()
    refused(hflow(*arguments), setting)
    assert tree() == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)), -1))
from hflow_rt.cli.__main__ import main
main()
"""


def test_not_enough_memory_to_sample(python: Command, run: Path) -> None:
    refused(python(LIMITED, 4 * 10**9, "sample", "-n", 3 * 10**6, "--batch", 3 * 10**6, "-o", "many"), "--batch or -n")


def test_not_enough_memory_to_train(python: Command, run: Path) -> None:
    arguments = ("train", "--set", "training.batch_size=3000", "--images", 3000, "--out", "mine")
    refused(
        python(LIMITED, 4 * 10**9, *arguments),
        "training.batch_size=3000",
        "lower it, and raise training.accumulate",
    )
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**12,), np.dtype("f4")),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 GiB"),
        type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 1"
        ),
    ],
)
def test_whatever_runs_out_of_memory_is_one_line(
    hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> object:
        raise error

    monkeypatch.setattr("hflow_rt.runtime.engines.onnx.OnnxEngine.run", fail)
    refused(
        hflow("sample", "-n", 2, "--batch", 2),
        "out of memory at 2 images a call; take fewer images together (--batch or -n)",
    )
    monkeypatch.setattr("hflow_rt.cli.latents.open_session", fail)
    refused(hflow("sample"), "out of memory; ask for fewer images together")


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not memory.is_out_of_memory(RuntimeError("shapes differ"))
    assert not memory.is_out_of_memory(ValueError("bad_alloc.png is no picture"))


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (("temperature", "-n", 200, "-o", "t.webp"), "16,383"),
        (("temperature", "-n", 800, "-o", "t.jpg"), "65,500"),
        (("sample", "-n", 2_000_000, "-o", "t.webp"), "16,383"),
        (("seeds", "0-2000", "--columns", 1, "-o", "t.jpg"), "65,500"),
        (("seeds", "0-2000", "--columns", 2000, "-o", "t.jpg"), "65,500"),
        (("mix", "--rows", "0-999", "--columns", "0", "-o", "t.webp"), "16,383"),
        (("zeroing", "--samples", "-n", 200, "-o", "t.webp"), "16,383"),
        (("heatmap", "-n", 200, "-o", "t.webp"), "16,383"),
        (("walk", "--rows", 1, "--columns", 200, "-o", "t.webp"), "16,383"),
        (("walk", "--rows", 1, "--columns", 1000, "-o", "t.gif"), "65,535"),
        (("walk", "--rows", 1, "--columns", 200, "-o", "t.mp4"), "16,384"),
    ],
)
def test_picture_too_large_for_its_format(
    hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], limit: str
) -> None:
    if arguments[0] != "mix":  # whose rows may be images, which say how many they are when read

        def never(*arguments: object, **options: object) -> object:
            raise AssertionError("nothing may be computed for it")

        monkeypatch.setattr("hflow_rt.runtime.session.Session.forward", never)
    before = tree()
    refused(hflow(*arguments), limit)
    assert tree() == before


def test_a_png_takes_what_others_do_not(hflow: Command, run: Path) -> None:
    ok(hflow("temperature", "-n", 200, "--at", "1", "-o", "t.png"))


FLAT = """
import resource, sys
import numpy as np
from hflow_rt.runtime.images.video import kept, save_animation
from pathlib import Path
count, path = int(sys.argv[1]), Path(sys.argv[2])
batches = (np.full((10, 64, 64, 3), index % 251, np.uint8) for index in range(count // 10))
frames = kept(batches, path)
save_animation(path, frames, 24, range(count))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("name", ["a.webp", "a.mp4"])
def test_memory_of_an_animation_is_flat(python: Command, tmp_path: Path, name: str) -> None:
    few, many = (int(ok(python(FLAT, count, tmp_path / name)).out) for count in (20, 2000))
    assert many - few < 12_000  # KiB; all frames in Pillow would be 32,000
