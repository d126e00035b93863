"""A tiny hflow model, its run folder and its exported bundle, made once for all tests."""

import gc
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from hflow_rt.models.registry import Family

# Tiny tensors gain nothing from threads, and spinning ones make the suite crawl on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Settings hold sets, whose order all workers shall write alike: what one of them traced another finds by its bytes. So
# nothing that depends on that order is found here.
os.environ.setdefault("PYTHONHASHSEED", "0")
# Exports make many objects that stay: looking through them again and again costs a tenth of the time.
gc.set_threshold(100_000, 50, 100)


def photographs(count: int, resolution: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colour images uint8 `[N, 3, R, R]`, all different."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, resolution)
    corners = rng.uniform(0, 255, (count, 3, 4, 1, 1))
    x, y = ramp[None, None, None, :], ramp[None, None, :, None]
    mixed = (
        corners[:, :, 0] * (1 - x) * (1 - y) + corners[:, :, 1] * x * (1 - y)
        + corners[:, :, 2] * (1 - x) * y + corners[:, :, 3] * x * y
    )  # fmt: skip
    return np.rint(mixed).astype(np.uint8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the largest share of slow tests first, so that no worker ends long after the others."""
    slow: dict[Path, list[bool]] = {}
    for item in items:
        slow.setdefault(item.path, []).append(item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -sum(slow[item.path]) / len(slow[item.path]))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `hflow-rt tune` kept on this machine is not tested, nor touched."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patched.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))  # not where a test counts its files
        yield


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def traced_once(common: Path) -> Iterator[None]:
    """What torch's exporter makes of one module, which takes it seconds, it makes once for the tests of all workers."""
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    kept = common / "traced"
    kept.mkdir(exist_ok=True)
    export = torch.onnx.export

    def once(module: Any, examples: Any, **options: Any) -> Any:
        whole = io.BytesIO()
        try:
            torch.save(module, whole)  # its code by name, its settings, all its numbers
        except (AttributeError, pickle.PicklingError):  # a test's own
            return export(module, examples, **options)
        about = (options["input_names"], options["output_names"], [tuple(example.shape) for example in examples])
        path = kept / hashlib.sha256(whole.getvalue() + repr(about).encode()).hexdigest()
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                made = path.with_suffix(".made")
                onnx.save(export(module, examples, **options).model_proto, made)
                made.rename(path)
        return SimpleNamespace(model_proto=onnx.load(path))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.onnx, "export", once)
        yield


@pytest.fixture(scope="session")
def docs_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`family_of_the_docs` can be imported: the code of docs/families.md."""
    docs = Path(__file__).parents[1] / "docs" / "families.md"
    code = re.search(r"```python\n(.*?)```", docs.read_text(), re.DOTALL)
    assert code is not None
    folder = tmp_path_factory.mktemp("docs")
    (folder / "family_of_the_docs.py").write_text(code[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    from hflow_rt.models.hflow.presets import TINY

    return json.loads(json.dumps(TINY["model"]))  # type: ignore[no-any-return]


def initialised(family: str, settings: Any, heads: float) -> Any:
    """A seeded model in eval mode, initialised on images, with nothing left at zero: what starts there gets `heads`."""
    torch = pytest.importorskip("torch")
    from hflow_rt.models.checkpoint import build_model
    from hflow_rt.training.config import TrainingConfig

    torch.manual_seed(0)
    model = build_model(family, settings)
    for parameter in model.parameters():
        if parameter.detach().abs().max() == 0:
            parameter.data = heads * torch.randn(parameter.shape)
    plan = model.plan(TrainingConfig(learning_rates={}))
    pictures = torch.from_numpy(photographs(16, model.resolution)[:, : model.channels])
    plan.start(pictures, torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[[Family], Any]:
    """The tiny model of a family. That of hflow is `tiny_model`, so that both are exported once."""
    return lambda family: initialised(family.name, family.tiny["model"], 0.05)


@pytest.fixture(scope="session")
def tiny_model(tiny_settings: dict[str, Any]) -> Any:
    return initialised("hflow", tiny_settings, 0.05)


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """`hflow-demo` with small heads, as a trained one has: with large ones rounding decides the image."""
    from hflow_rt.models.hflow.presets import PRESETS

    return initialised("hflow", PRESETS["hflow-demo"]["model"], 1e-3)


def run_of(common: Path, name: str, family: str, model: Callable[[], Any], images: NDArray[np.float32]) -> Path:
    """A run folder with weights and an exported, verified bundle, made by the first worker that asks for it."""
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.models.checkpoint import save_model

    run, made = common / "runs" / name, common / "made" / name
    with FileLock(common / f"{name}.lock"):
        if not run.exists():
            trained = model()
            save_model(made / "model.safetensors", family, trained, trained.state_dict(), {"images": 0})
            manifest = export_bundle(made / "model.safetensors", made / "bundle", images)
            assert manifest.verified, manifest.parity
            run.parent.mkdir(exist_ok=True)
            made.rename(run)
    return run


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Any, common: Path) -> Path:
    """A run of all workers. Copy it before changing anything."""
    return run_of(common, "tiny", "hflow", lambda: tiny_model, photographs(4, 16, seed=1).astype(np.float32) / 255)


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that setuptools builds of a copy of the sources, offline."""
    root, sources = Path(__file__).parents[1], tmp_path_factory.mktemp("sources")
    for folder in tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(root / folder, sources / folder, ignore=shutil.ignore_patterns("__pycache__", "web-runtime"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, sources)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return sources / "dist" / built.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def many_steps(tiny: Callable[[Family], Any], common: Path) -> Path:
    """As `tiny_run`, of a model that takes 4 steps each way, its prior a bank, and can take fewer."""
    from hflow_rt.models.registry import family

    images = photographs(3, 8, seed=1).astype(np.float32) / 255
    return run_of(common, "many", "ihdm", lambda: tiny(family("ihdm")), images)


@pytest.fixture(scope="session")
def slots_run(tiny: Callable[[Family], Any], common: Path) -> Path:
    """As `tiny_run`, of a model of one latent without an inverse, whose layers have values of their own."""
    from hflow_rt.models.registry import family

    return run_of(common, "slots", "inrgan", lambda: tiny(family("inrgan")), np.zeros((1, 3, 16, 16), np.float32))
