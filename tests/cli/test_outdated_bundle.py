"""A run that was trained on after its export: whoever names it is told that its bundle is of older weights."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok
from safetensors.torch import load_file, save_file

from hflow_rt.models.checkpoint import METADATA_KEY, read_metadata
from hflow_rt.runtime import load

Command = Callable[..., Any]


@pytest.fixture
def trained_on(run: Path) -> Path:
    """The run with other weights than those its bundle was made of."""
    model = run / "model.safetensors"
    tensors = {
        name: value.half().float() if value.is_floating_point() else value for name, value in load_file(model).items()
    }
    save_file(tensors, model, {METADATA_KEY: json.dumps(read_metadata(model) | {"images": 400})})
    return run


LINE = "warning: runs/tiny/bundle is of other weights than runs/tiny has now; run 'hflow-rt export runs/tiny'"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "RUN", "-n", 1),
        ("sample", "-n", 1),  # the latest run
        ("sample", "RUN", "-n", 1, "--json"),
        ("encode", "samples.png", "--model", "RUN"),
        ("walk", "--model", "RUN", "--frames", 2, "--keyframes", 2),
        ("check", "RUN"),
        ("info", "RUN"),
        ("info", "RUN", "--json"),
        ("tune", "RUN", "--forget"),
    ],
)
def test_bundle_older_than_run(hflow: Command, trained_on: Path, photo: Command, arguments: tuple[object, ...]) -> None:
    photo("samples.png", 32, 32) if arguments[0] == "encode" else None
    result = ok(hflow(*(trained_on if word == "RUN" else word for word in arguments)))
    assert result.err.splitlines().count(LINE) == 1
    if "--json" in arguments:
        json.loads(result.out)
    if arguments == ("info", "RUN", "--json"):
        assert json.loads(result.out)["bundle"]["outdated"] is True
    if arguments == ("info", "RUN"):
        assert "verified, but OF OTHER WEIGHTS" in result.out


@pytest.mark.parametrize("place", ["inside", "elsewhere"])
def test_a_bundle_named_by_itself_needs_no_such_line(hflow: Command, trained_on: Path, place: str) -> None:
    bundle = trained_on / "bundle"
    if place == "elsewhere":
        bundle = bundle.rename("elsewhere")
    result = ok(hflow("sample", bundle, "-n", 1))
    assert "warning" not in result.err


def test_a_run_as_it_was_exported_needs_no_such_line(hflow: Command, run: Path) -> None:
    assert "warning" not in ok(hflow("sample", run, "-n", 1)).err


def test_exporting_again_brings_it_up_to_date_with_rounded_weights_too(hflow: Command, trained_on: Path) -> None:
    ok(hflow("export", trained_on, "--half", "--route", "forward"))
    assert "warning" not in ok(hflow("info", trained_on)).err


def test_python_warns_too(trained_on: Path) -> None:
    with pytest.warns(UserWarning, match="is of other weights than"):
        load(trained_on)
    shutil.copytree(trained_on / "bundle", "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("moved")
