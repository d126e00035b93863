"""Bad input: one line that says what must hold, what was found and what to do; exit code 1; nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hflow_rt.cli import sample as sample_command
from hflow_rt.manifest import read_manifest
from hflow_rt.models.checkpoint import METADATA_KEY, load_model, read_metadata
from hflow_rt.runtime.latents import load_latents, save_latents

Command = Callable[..., Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def refused(result: Any, *parts: str) -> None:
    """The command exited 1 with one error line, its last, that holds `parts`."""
    assert result.code == 1, result.out + result.err
    *before, last = result.err.splitlines()
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert not any("error" in line or "Traceback" in line for line in before)
    assert "next:" not in result.out


def tree(folder: Path | str = ".") -> set[str]:
    """Every file and folder there, hidden ones as well."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


# images


@pytest.fixture(params=["dataset", "train", "encode", "export"])
def read_images(request: pytest.FixtureRequest, hflow: Command, run: Path) -> Command:
    """Each command that reads images, on a source: its result, and a check that it wrote nothing."""
    arguments = {
        "dataset": lambda source: ("dataset", source, "-o", "made.npy", "--resolution", 16),
        "train": lambda source: ("train", "--preset", "hflow-demo", "--data", source, "--out", "made"),
        "encode": lambda source: ("encode", source, "-o", "made.safetensors"),
        "export": lambda source: ("export", "--images", source, "-o", "made"),
    }[request.param]

    def call(source: object) -> Any:
        before = tree()
        result = hflow(*arguments(source))
        assert tree() == before
        return result

    return call


def test_an_empty_folder(read_images: Command) -> None:
    Path("empty").mkdir()
    refused(read_images("empty"), "empty holds no files; give a folder, zip or tar with images")


def test_a_folder_without_images(read_images: Command) -> None:
    Path("docs").mkdir()
    Path("docs/notes.txt").write_text("words")
    refused(read_images("docs"), "docs", "not an image")


def test_images_smaller_than_the_resolution(read_images: Command, photo: Command) -> None:
    photo("small/a.png", 15, 200)
    photo("small/b.png", 3, 3)
    refused(
        read_images("small"), "small is smaller than the resolution ", "(the largest is 15x200); give larger images"
    )


def test_a_broken_archive(read_images: Command) -> None:
    Path("photos.zip").write_bytes(b"PK\x03\x04 and then nothing")
    refused(read_images("photos.zip"), "photos.zip is not a whole zip file", "copy or download it again")


def test_a_source_that_is_not_there(read_images: Command) -> None:
    refused(read_images("nowhere"), "nowhere")


def test_a_source_that_would_never_end(read_images: Command) -> None:
    os.mkfifo("pipe")  # opening it waits until somebody writes
    refused(read_images("pipe"), "pipe")


def test_a_folder_that_may_not_be_read(read_images: Command) -> None:
    Path("photos").mkdir()
    Path("photos/secret").mkdir(0o000)
    if os.access("photos/secret", os.R_OK):
        pytest.skip("root may read everything")
    refused(read_images("photos"), "cannot read ", "photos/secret: Permission denied")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"words", "is not a whole image of a known kind"), (b"", "is not a whole image of a known kind")],
)
def test_a_file_that_is_no_image(hflow: Command, run: Path, content: bytes, reason: str) -> None:
    Path("a.png").write_bytes(content)
    refused(hflow("encode", "a.png"), "a.png", reason)
    refused(hflow("interpolate", "a.png", "a.png"), "a.png", reason)


def test_one_image_too_small(hflow: Command, run: Path, photo: Command) -> None:
    refused(
        hflow("encode", photo("a.png", 15, 40)),
        "a.png cannot be used: it is 15x40, smaller than 16; give a square image of at least 16x16",
    )


@pytest.mark.parametrize("count", [1, 3])
def test_interpolation_joins_two(hflow: Command, run: Path, photo: Command, count: int) -> None:
    names = [photo(f"folder/{index}.png") for index in range(count)]
    for images in (names, ["folder"]):
        refused(hflow("interpolate", *images), f"an interpolation joins two images, not {count}")


# model files


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_a_truncated_model_file(hflow: Command, run: Path, share: float) -> None:
    model = run / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[: int(share * len(whole))])
    for command in ("export", "info"):
        refused(hflow(command), f"{model} is not a whole safetensors file (", "copy or train it again")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{" * 16, b"words"])
def test_a_corrupt_model_file(hflow: Command, run: Path, content: bytes) -> None:
    (run / "model.safetensors").write_bytes(content)
    refused(hflow("export"), "is not a whole safetensors file (")


def rewrite(model: Path, metadata: Mapping[str, Any] | str | None, change: Command = lambda tensors: None) -> None:
    tensors = load_file(model)
    change(tensors)
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors, model, None if metadata is None else {METADATA_KEY: text})


def test_tensors_of_something_else(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    rewrite(model, None)
    refused(hflow("export"), f"{model} holds tensors but no hflow-rt settings")


@pytest.mark.parametrize("settings", ["{", "[]", "{}", '{"family": "hflow"}', '{"family": 3, "config": {}}'])
def test_settings_inside_that_make_no_sense(hflow: Command, run: Path, settings: str) -> None:
    rewrite(run / "model.safetensors", settings)
    for command in ("export", "info"):
        refused(hflow(command), f"{run}/model.safetensors: the settings inside ")


def test_a_model_of_another_family(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    rewrite(model, read_metadata(model) | {"family": "someflow"})
    refused(hflow("export"), "unknown model family 'someflow'; known: ", "hflow")


def test_a_model_of_another_shape(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    shapes = load_model(model).state_dict()
    metadata = read_metadata(model)
    metadata["config"]["levels"][0]["decoder_channels"] = 10
    rewrite(model, metadata)
    result = hflow("export")
    refused(result, f"{model} does not fit the model: ", "more")
    # each names the parameter and both shapes
    message = result.err.splitlines()[-1].partition(": ")[2].partition(": ")[2]
    for line in message.split("; ")[:-1]:
        name, _, rest = line.partition(" is ")
        found, _, needed = rest.removesuffix(" in the model").partition(" in the file and ")
        assert found == str(list(shapes[name].shape))
        assert needed != found
        assert "10" in needed


def test_a_model_file_that_lacks_a_weight_or_holds_nan(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    metadata, names = read_metadata(model), sorted(load_file(model))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[names[0]]
        tensors[names[1]] = torch.full_like(tensors[names[1]], torch.nan)
        tensors["extra"] = torch.zeros(2)

    rewrite(model, metadata, change)
    refused(hflow("export"), f"missing {names[0]} [", f"{names[1]} holds NaN", "unexpected extra [2]")


def test_a_model_file_that_is_not_there(hflow: Command, run: Path) -> None:
    refused(hflow("export", "nowhere"), "no run at nowhere; train one with 'hflow-rt train'")
    refused(hflow("info", "nowhere"), "no run at nowhere")
    Path("empty").mkdir()
    refused(hflow("export", "empty"), "empty holds no model.safetensors, so it is no trained run")


# bundles


@pytest.mark.parametrize("command", [("sample", "-n", 1), ("check",), ("interpolate",)])
def test_a_bundle_with_a_changed_byte(hflow: Command, run: Path, command: tuple[object, ...]) -> None:
    engine = run / "bundle" / "forward.onnx"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    before = tree()
    refused(hflow(*command), f"{engine} was changed after export (sha256 ", "export again")
    assert tree() == before


def test_a_truncated_engine(hflow: Command, run: Path) -> None:
    os.truncate(run / "bundle" / "forward.onnx", 1000)
    refused(hflow("sample"), "must be ", " bytes, not 1000: it was cut or replaced; export again")


def test_a_missing_engine_file(hflow: Command, run: Path, photo: Command) -> None:
    (run / "bundle" / "inverse.onnx").unlink()
    refused(hflow("encode", photo("a.png")), f"{run}/bundle has no inverse.onnx; export again with 'hflow-rt export'")
    refused(hflow("check"), "has no inverse.onnx")
    assert hflow("sample", "-n", 1).code == 0


def test_a_direction_that_was_not_exported(hflow: Command, run: Path, photo: Command) -> None:
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    for graph in ("inverse", "end_inverse"):
        del manifest["graphs"][graph]
    (run / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    expected = "has no 'inverse' engine (it has: forward, end_forward); export it with 'hflow-rt export'"
    refused(hflow("encode", photo("a.png")), expected)
    refused(hflow("interpolate", "--space", "y0"), "has no 'end_inverse' engine")


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 2}', "[1]"])
def test_a_garbled_manifest(hflow: Command, run: Path, content: str) -> None:
    (run / "bundle" / "manifest.json").write_text(content)
    for command in ("sample", "check", "info"):
        refused(hflow(command), f"{run}/bundle/manifest.json is broken or of another version (", "export again")


def test_export_does_not_replace_what_is_no_bundle(hflow: Command, run: Path, photo: Command) -> None:
    photo("photos/a.png")
    refused(hflow("export", "-o", "photos"), "photos exists and is not a bundle; choose another --out")
    assert tree("photos") == {"a.png"}


# names


@pytest.mark.parametrize("command", ["sample", "check", "interpolate"])
def test_unknown_backend_and_device(hflow: Command, run: Path, command: str) -> None:
    refused(hflow(command, "--backend", "tensorflow"), "unknown backend 'tensorflow'; known: onnx, trt, torch")
    refused(hflow(command, "--device", "tpu"), "unknown device 'tpu'; known: auto, cpu, cuda")


def test_a_provider_that_is_not_there(hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    expected = "CUDAExecutionProvider is not in this ONNX Runtime; pip install 'hflow-rt[gpu]' or use --device cpu"
    refused(hflow("sample", "--device", "cuda"), expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(hflow("sample", "--backend", "torch", "--device", "cuda"), "torch finds no CUDA device here")
    assert not Path("samples.png").exists()


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("onnxruntime", ("sample",), "hflow-rt[cpu]"),
        ("torch", ("sample", "--backend", "torch"), "hflow-rt[train]"),
        ("torch", ("export",), "hflow-rt[train]"),
        ("onnx", ("export",), "hflow-rt[train]"),
        ("onnxscript", ("check",), "hflow-rt[train]"),
        ("accelerate", ("train",), "hflow-rt[train]"),
        ("av", ("interpolate", "-o", "a.mp4"), "hflow-rt[video]"),
    ],
)
def test_a_missing_extra_is_named(
    hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, package: str, command: tuple[str, ...], extra: str
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    refused(hflow(*command), f"pip install '{extra}'")


def test_unknown_engine(hflow: Command, run: Path) -> None:
    refused(hflow("export", "--engine", "coreml"), "this version builds no 'coreml' engines; known: onnx")


def test_unknown_mode_space_and_preset(hflow: Command, run: Path) -> None:
    refused(hflow("interpolate", "--mode", "cubic"), "interpolation mode must be one of lerp, slerp; found 'cubic'")
    refused(hflow("interpolate", "--space", "w"), "unknown space 'w' for this hflow model; known: z, y0")
    refused(hflow("train", "--preset", "hflow-63"), "unknown preset 'hflow-63'", "hflow-64")


# numbers


@pytest.mark.parametrize("std", ["0", "-1", "nan", "inf", "wide", "z0=0", "z0=nan", "end0=", ""])
def test_impossible_std(hflow: Command, run: Path, std: str) -> None:
    refused(hflow("sample", f"--std={std}"), "std must be a finite number > 0; found '", "end0, end1, z1, z0")
    assert not Path("samples.png").exists()


def test_std_of_an_unknown_latent(hflow: Command, run: Path) -> None:
    refused(
        hflow("sample", "--std", "z9=0.5"),
        "unknown latent 'z9' in std; the latents of this model are end0, end1, z1, z0",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "--batch", 0), "the batch must be at least 1, not 0"),
        (("sample", "--batch", -2), "the batch must be at least 1, not -2"),
        (("sample", "-n", 0), "the number of images must be at least 1, not 0"),
        (("sample", "-n", -1), "the number of images must be at least 1, not -1"),
        (("sample", "--seed", -1), "seed must be in 0 .. 2^64 - 1; found -1"),
        (("sample", "--seed", 2**64), "seed must be in 0 .. 2^64 - 1; found 18446744073709551616"),
        (("interpolate", "--frames", 1), "an interpolation needs at least 2 frames, not 1"),
        (("interpolate", "--fps", 0, "-o", "a.gif"), "fps must be above 0, not 0"),
        (("interpolate", "--fps", "nan", "-o", "a.gif"), "fps must be above 0, not nan"),
        (("interpolate", "--fps", 1000, "-o", "a.gif"), ".gif needs 0.1 .. 50 frames per second; found 1000"),
        (("train", "--minutes", 0), "--minutes must be > 0; found 0"),
        (("train", "--minutes", "nan"), "--minutes must be > 0; found nan"),
        (("train", "--images", -5), "--images must be > 0; found -5"),
        (("train", "--set", "training.batch_size=0"), "training.batch_size: "),
    ],
)
def test_impossible_numbers(hflow: Command, run: Path, arguments: tuple[object, ...], message: str) -> None:
    before = tree()
    refused(hflow(*arguments), message)
    assert tree() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "-n", "many"),
        ("sample", "--seed", "1.5"),
        ("sample", "--unknown"),
        ("export", "--direction", "sideways"),
        ("dataset", "photos"),
        ("encode",),
        ("paint",),
    ],
)
def test_usage_errors_exit_2(hflow: Command, run: Path, arguments: tuple[str, ...]) -> None:
    result = hflow(*arguments)
    assert result.code == 2
    assert "Usage: hflow-rt" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


# output


@pytest.mark.parametrize("output", ["a.bmp", "a.txt", "a.PNG.part"])
def test_a_picture_of_unknown_kind(hflow: Command, run: Path, output: str) -> None:
    refused(
        hflow("sample", "-n", 1, "-o", output),
        f"a picture's name must end in .png, .jpg, .jpeg, .webp; found '{output}'",
    )
    refused(hflow("interpolate", "-o", output), f"an animation must end in .gif, .webp, .mp4, .png; found '{output}'")


def writing(output: Path) -> dict[str, tuple[object, ...]]:
    """Every command that writes, told to write at `output`."""
    return {
        "grid": ("sample", "-n", 4, "-o", output.with_suffix(".png")),
        "folder": ("sample", "-n", 4, "-o", output),
        "latents": ("sample", "-n", 4, "-o", "/dev/null/never.png", "--latents", output.with_suffix(".safetensors")),
        "encode": ("encode", "a.png", "-o", output.with_suffix(".safetensors")),
        "gif": ("interpolate", "-o", output.with_suffix(".gif")),
        "mp4": ("interpolate", "-o", output.with_suffix(".mp4")),
        "dataset": ("dataset", "a", "-o", output.with_suffix(".npy"), "--resolution", 16),
        "train": ("train", "--images", 16, "--out", output),
        "export": ("export", "-o", output),
    }


KINDS = sorted(writing(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_below_a_file(hflow: Command, run: Path, photo: Command, kind: str) -> None:
    shutil.copytree(photo("a/a.png").parent, "b")
    photo("a.png")
    before = tree()
    refused(hflow(*writing(Path("a.png/deep/made"))[kind]), "cannot write ", "; free space or choose another place")
    assert tree() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("folder", "train", "export", "latents")])
def test_an_output_that_is_a_folder(hflow: Command, run: Path, photo: Command, kind: str) -> None:
    photo("a/a.png")
    photo("a.png")
    arguments = writing(Path("made"))[kind]
    target = next(word for word in arguments if isinstance(word, Path))
    (target / "inside").mkdir(parents=True)
    before = tree()
    refused(hflow(*arguments), f"cannot write {target}: Is a directory")
    assert tree() == before


FULL = """
import resource, sys
from hflow_rt.cli.__main__ import main
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # writing beyond fails as on a full disk
main()
"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "latents"])
def test_a_full_disk(python: Command, run: Path, photo: Command, kind: str) -> None:
    photo("a/a.png")
    photo("a/b.png")
    photo("a.png", 60, 60)
    before = tree()
    result = python(FULL, 50_000 if kind == "export" else 300, *writing(Path("made"))[kind])
    refused(result, "cannot write made", ": File too large; free space or choose another place")
    assert tree() - before <= {"made"}  # at most an empty folder
    assert kind != "export" or not Path("made").exists()


def test_a_full_disk_keeps_the_bundle_that_was_there(python: Command, run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()}
    refused(python(FULL, 50_000, "export", "--direction", "inverse"), f"cannot write {run}/bundle: ")
    assert {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()} == before


# latents


def test_latents_of_another_model(hflow: Command, run: Path) -> None:
    assert hflow("sample", "-n", 2, "--latents", "z.safetensors").code == 0
    values, about = load_latents("z.safetensors")
    save_latents("other.safetensors", values | {"z0": np.zeros((2, 3, 32, 32), np.float32)}, about)
    refused(
        hflow("decode", "other.safetensors"),
        "other.safetensors: latents do not fit the model: z0 is [3, 32, 32] there and [3, 16, 16] in the model",
        "use latents of this model",
    )
    save_latents("names.safetensors", {"w" + name: value for name, value in values.items()}, about)
    refused(hflow("decode", "names.safetensors"), "names.safetensors: ", "missing end0 [2, 1, 1]")
    save_latents("nan.safetensors", {name: np.nan * value for name, value in values.items()}, about)
    refused(hflow("decode", "nan.safetensors"), "end0 holds NaN")
    assert not Path("decoded.png").exists()


def test_a_file_that_holds_no_latents(hflow: Command, run: Path) -> None:
    refused(
        hflow("decode", run / "model.safetensors"),
        "holds tensors but no latents; give a file written by 'hflow-rt encode'",
    )
    refused(hflow("decode", "nowhere.safetensors"), "no latents file at nowhere.safetensors")
    hflow("sample", "-n", 2, "--latents", "z.safetensors")
    os.truncate("z.safetensors", 500)
    refused(hflow("decode", "z.safetensors"), "z.safetensors is not a whole latents file (", "encode or copy it again")


# Ctrl-C


# a process started in the background by a script ignores SIGINT, and so do its children
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hflow_rt.cli.__main__ import main
main()
"""


def interrupted(*arguments: object, after: str) -> Any:
    """Start a command in a process of its own, send SIGINT once stderr shows `after`; exit code, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    seen = ""
    for line in process.stderr:
        seen += line
        if after in line:
            process.send_signal(signal.SIGINT)
            break
    seen += process.stderr.read()
    out = process.stdout.read()
    code = process.wait()
    watchdog.cancel()
    process.stdout.close()
    process.stderr.close()
    assert after in seen, seen
    return code, out, seen


def test_ctrl_c_during_export(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()}
    code, out, err = interrupted("export", after="writing forward.onnx")
    assert code == 130
    assert out == ""
    assert err == "writing forward.onnx\ninterrupted; nothing half-written was kept\n"
    assert {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()} == before
    assert read_manifest(run / "bundle").verified


def test_ctrl_c_during_the_first_export(run: Path) -> None:
    shutil.rmtree(run / "bundle")
    code, _, err = interrupted("export", after="writing forward.onnx")
    assert code == 130
    assert err.endswith("\ninterrupted; nothing half-written was kept\n")
    assert tree(run) == {"model.safetensors"}


def test_ctrl_c_during_train(hflow: Command, run: Path, photo: Command, tiny_settings: dict[str, Any]) -> None:
    for index in range(20):
        photo(f"photos/{index}.png")
    training = {
        "batch_size": 2,
        "accumulate": 1,
        "images": 1_000_000,
        "init_images": 8,
        "learning_rates": dict.fromkeys(("encoders", "decoders", "flows"), 1e-4),
        "evaluate_images": 2,
        "evaluate_every_images": 20,
        "sample_every_images": 1_000_000,
    }
    Path("tiny.json").write_text(json.dumps({"family": "hflow", "model": tiny_settings, "training": training}))
    arguments = ("train", "--config", "tiny.json", "--data", "photos", "--out", "runs/mine")
    code, out, err = interrupted(*arguments, after="20 images")
    assert code == 130, err
    assert err.endswith("\ninterrupted and saved; go on with: hflow-rt train --resume runs/mine\n")
    assert "Traceback" not in err
    assert "next: hflow-rt train --resume runs/mine" in out
    assert not [name for name in tree("runs/mine") if Path(name).name.startswith(".")]
    seen = int(sorted(Path("runs/mine/checkpoints").iterdir())[-1].name)
    assert load_model("runs/mine/model.safetensors").resolution == 16
    more = hflow("train", "--resume", "runs/mine", "--images", seen + 4, "--json")
    assert more.code == 0, more.err
    assert json.loads(more.out)["images"] == seen + 4


def test_what_a_killed_process_leaves_is_never_picked_up(hflow: Command, run: Path) -> None:
    """Temporary names begin with a dot: neither the newest run nor its bundle is ever one of them."""
    shutil.copytree(run, "runs/.tiny.k3j2h1")
    os.utime("runs/.tiny.k3j2h1/model.safetensors", (2**31, 2**31))
    shutil.copytree(run / "bundle", run / ".bundle.x1y2z3")
    shutil.rmtree(run / "bundle")
    refused(hflow("sample"), f"{run} has no exported bundle; run 'hflow-rt export {run}' first")
    assert hflow("info").out.startswith(f"{run}: hflow")


@pytest.mark.parametrize("when", ["before", "while"])
def test_ctrl_c_anywhere_is_one_line(hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def interrupt(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt

    if when == "before":
        monkeypatch.setattr(sample_command, "open_session", interrupt)
    else:
        monkeypatch.setattr(sample_command, "write_pictures", interrupt)
    result = hflow("sample")
    assert result.code == 130
    assert result.out == ""
    assert result.err.splitlines()[-1] == "interrupted; nothing half-written was kept"
    assert not Path("samples.png").exists()


def test_a_bug_shows_its_traceback(hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object, **options: object) -> object:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sample_command, "open_session", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        hflow("sample")
