"""What the inference server runs, without one; with the real one in tests/export/test_served.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hflow_rt.runtime import served
from hflow_rt.runtime.served import ROUTE, TritonPythonModel


@pytest.mark.parametrize(
    ("kind", "seen", "number", "expected", "device"),
    [
        ("GPU", None, "1", "1", "auto"),
        ("GPU", "", "0", "0", "auto"),
        ("GPU", "2,5", "1", "5", "auto"),
        ("GPU", "GPU-a,GPU-b", "0", "GPU-a", "auto"),
        ("CPU", "2,5", "0", "2,5", "cpu"),
    ],
)
def test_an_instance_sees_the_gpu_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, kind: str, seen: str | None, number: str, expected: str, device: str
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        served, "load", lambda path, device: opened.append((path, device, os.environ["CUDA_VISIBLE_DEVICES"]))
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    config = json.dumps({"parameters": {ROUTE: {"string_value": "sample"}}})
    place = {"model_repository": "models/x_sample", "model_version": "3", "model_config": config}
    TritonPythonModel().initialize({**place, "model_instance_kind": kind, "model_instance_device_id": number})
    assert opened == [(Path("models/x_sample/3/bundle"), device, expected)]
