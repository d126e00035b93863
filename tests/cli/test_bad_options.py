"""Names and numbers that make no sense: one line that says what would."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import refused, tree

Command = Callable[..., Any]


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
        (("interpolate", "--frames", 1), "the number of frames must be at least 2, not 1"),
        (("interpolate", "--fps", 0, "-o", "a.gif"), "fps must be above 0, not 0"),
        (("interpolate", "--fps", "nan", "-o", "a.gif"), "fps must be above 0, not nan"),
        (("interpolate", "--fps", 1000, "-o", "a.gif"), ".gif needs 0.1 .. 50 frames per second; found 1000"),
        (("train", "--minutes", 0), "--minutes must be > 0 and finite; found 0"),
        (("train", "--minutes", "nan"), "--minutes must be > 0 and finite; found nan"),
        (("train", "--images", -5), "--images must be > 0 and finite; found -5"),
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
        ("export", "--route", "sideways"),
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
