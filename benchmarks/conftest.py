"""Shared by the benchmarks: models to measure, fair timing, and a report of ratios.

    pytest benchmarks                    everything, a table at the end
    pytest benchmarks --report NAME      also benchmarks/results/NAME.json and NAME.md

A ratio compares medians of rounds that take turns in one process, so that a slow spell of the machine hits all
variants alike. Nothing here passes or fails by time.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RESULTS = Path(__file__).parent / "results"
_ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", metavar="NAME", help="write benchmarks/results/NAME.json and .md")


def take_turns(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; the order rotates every round, after one round of warm-up."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            started = time.perf_counter()
            variants[name]()
            if index > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def record(title: str, seconds: dict[str, list[float]], **more: Any) -> None:
    """Keep a row a variant for the report; the first variant is the baseline of the ratios."""
    baseline = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else 0.0
        row = {"what": title, "variant": name, "median_ms": median * 1e3, "min_ms": min(values) * 1e3}
        _ROWS.append(row | {"ratio": baseline / median, "cov": spread, "rounds": len(values), **more})


@pytest.fixture(name="take_turns")
def take_turns_fixture() -> Callable[..., dict[str, list[float]]]:
    return take_turns


@pytest.fixture(name="record")
def record_fixture() -> Callable[..., None]:
    return record


def trained_like(preset: str) -> Any:
    """A model of `preset` with nothing at zero and its actnorms fitted to smooth images, seeded.

    The heads that start at zero get little, so that the flow stays as well conditioned as a trained one: with
    large random heads a few bits of rounding decide the image.
    """
    from hflow_rt.models.checkpoint import build_model
    from hflow_rt.training.config import load_config

    torch.manual_seed(0)
    settings = load_config(preset)
    model = build_model(settings.family, settings.model)
    for parameter in model.parameters():
        if parameter.detach().abs().max() == 0:
            parameter.data = 1e-3 * torch.randn(parameter.shape)
    small = torch.rand(8, 3, 4, 4)
    pixels = torch.nn.functional.interpolate(small, size=model.resolution, mode="bilinear") * 255
    model.initialize(pixels.to(torch.uint8), torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Path]]:
    """`exported(preset, direction)` gives the model and its verified bundle, made once a session."""
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.models.checkpoint import save_model
    from hflow_rt.training.config import load_config

    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def make(preset: str, direction: Any = "both") -> tuple[Any, Path]:
        if (preset, direction) not in made:
            model = trained_like(preset)
            folder = tmp_path_factory.mktemp(preset)
            name = load_config(preset).family
            save_model(folder / "model.safetensors", name, model, model.state_dict(), {})
            ramp = np.linspace(0, 1, model.resolution, dtype=np.float32)
            images = np.broadcast_to(ramp, (2, 3, model.resolution, model.resolution)).copy()
            images[1] = images[1].transpose(0, 2, 1)
            images = np.rint(images * 255) / np.float32(255)  # 8-bit values, as real images have
            manifest = export_bundle(folder / "model.safetensors", folder / "bundle", images, direction)
            assert manifest.verified, manifest.parity
            made[preset, direction] = model, folder / "bundle"
        return made[preset, direction]

    return make


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = ("torch", "onnxruntime", "onnx", "numpy")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: importlib.metadata.version(name) for name in names},
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| what | variant | median | ratio | CoV | more |", "|---|---|---:|---:|---:|---|"]
    known = {"what", "variant", "median_ms", "min_ms", "ratio", "cov", "rounds"}
    for row in rows:
        more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        unstable = " (unstable)" if row["cov"] > 0.025 else ""
        cells = f"{row['median_ms']:.1f} ms | {row['ratio']:.2f}x | {row['cov']:.1%}{unstable}"
        lines.append(f"| {row['what']} | {row['variant']} | {cells} | {more} |")
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    about = machine()
    terminalreporter.write_line("\n" + markdown(_ROWS, about))
    name = config.getoption("--report")
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps({"machine": about, "rows": _ROWS}, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(markdown(_ROWS, about))
