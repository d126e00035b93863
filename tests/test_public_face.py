"""`import hflow_rt`: light, complete, as the documents say, and every example runs."""

import ast
import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hflow_rt
from hflow_rt.runtime.known import Known
from hflow_rt.runtime.running import Runner
from hflow_rt.runtime.session import Session

ROOT = Path(__file__).parents[1]
NAMES = ["Client", "Session", "check", "errors", "export", "load", "pretrained", "train"]
PUBLIC = [name for name in {**vars(Runner), **vars(Known), **vars(Session)} if not name.startswith("_")]

IMPORT = """
import sys, time
before = time.perf_counter()
import hflow_rt
seconds = time.perf_counter() - before
heavy = {"torch", "numpy", "pydantic", "PIL", "onnxruntime", "onnx", "typer"} & sys.modules.keys()
assert not heavy, heavy
assert [name for name in sys.modules if name.startswith("hflow_rt.")] == []
print(seconds)
"""


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where examples run: a photo larger than the models, an exported run, a folder of images; no time to train."""

    def trained(config: Any, data: Any, out: Path, **options: Any) -> Any:
        assert (config.preset, len(data), options["minutes"]) == ("hflow-demo", 3, 5)
        return SimpleNamespace(run=out)

    monkeypatch.setattr("hflow_rt.training.trainer.train", trained)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/my-run")
    ramp = np.linspace(0, 255, 90)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :80], np.float64(40)), axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save("photo.png")
    Path("photos").mkdir()
    for name in "abc":
        shutil.copy("photo.png", f"photos/{name}.png")
    return tmp_path


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_importing_takes_no_time_and_no_package() -> None:
    def once() -> float:
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert min(once() for _ in range(3)) < 0.05


def test_the_names() -> None:
    assert hflow_rt.__all__ == NAMES == sorted(NAMES)
    assert set(NAMES) | {"__version__"} <= set(dir(hflow_rt))
    for name in NAMES:
        assert getattr(hflow_rt, name).__doc__
    namespace: dict[str, Any] = {}
    exec("from hflow_rt import *", namespace)
    assert namespace.keys() >= set(NAMES)
    with pytest.raises(AttributeError, match="module 'hflow_rt' has no attribute 'nothing'"):
        hflow_rt.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_are_told_of_the_same_names() -> None:
    tree = ast.parse((ROOT / "hflow_rt" / "__init__.py").read_text())
    (told,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    found = {}
    for line in told.body:
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            assert alias.asname == alias.name  # a plain import is none of the package's names
            found[alias.name] = line.module
    assert sorted(found) == NAMES
    for name, module in found.items():
        if name == "errors":
            assert importlib.import_module(f"{module}.errors") is hflow_rt.errors
        elif name == "export":  # the package, which can be called
            function = importlib.import_module(str(module)).export
            assert inspect.signature(hflow_rt.export) == inspect.signature(function)
        else:
            assert getattr(importlib.import_module(str(module)), name) is getattr(hflow_rt, name)


def test_export_is_a_package_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import hflow_rt.export.public as public  # binds hflow_rt.export

    called = []
    monkeypatch.setattr(public, "export", lambda *arguments, **options: called.append((arguments, options)))
    hflow_rt.export("runs/x", half=True)
    assert called == [(("runs/x",), {"half": True})]
    assert sys.modules["hflow_rt.export"] is hflow_rt.export  # type: ignore[comparison-overlap]


def test_the_example_of_the_readme_runs_as_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = code_blocks((ROOT / "README.md").read_text())
    lines = block.split("\n\n")[1].strip().splitlines()
    assert len(lines) == 4  # open, read, inverse, forward
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["images"].shape == (1, 3, 64, 64)
    assert found["latents"]["z0"].shape == (1, 3, 64, 64)
    levels = [np.rint(255 * found[name]) for name in ("images", "again")]
    np.testing.assert_array_equal(*levels)
    assert np.ptp(levels[0]) > 200


def test_examples_of_docstrings_run(folder: Path) -> None:
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    ran = {}
    for name in NAMES:
        found = getattr(hflow_rt, name)
        if name == "export":
            found = inspect.getmodule(hflow_rt.check).export  # type: ignore[union-attr]
        tests = finder.find(found, name, globs={}) if name != "errors" else finder.find(found, name, found, globs={})
        ran[name] = sum(len(test.examples) for test in tests)
        for test in tests:
            assert runner.run(test).failed == 0, test.name
    assert min(ran.values()) > 0, ran
    for test in finder.find(hflow_rt, "hflow_rt", False, globs={}):
        if test.name == "hflow_rt":
            assert len(test.examples) == 5
            assert runner.run(test).failed == 0


def test_load_makes_what_is_no_bundle_yet(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run gets its bundle, a model file one in the cache, which serves the next call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    expected = hflow_rt.load(tiny_run).sample(1, seed=3)
    with pytest.warns(UserWarning, match="has no bundle yet"):
        found = hflow_rt.load(tmp_path / "run")
    assert found.bundle.path == tmp_path / "run" / "bundle"
    np.testing.assert_array_equal(found.sample(1, seed=3), expected)
    with pytest.warns(UserWarning, match="making one in"):
        found = hflow_rt.load(tmp_path / "run" / "model.safetensors")
    assert found.bundle.path.is_relative_to(tmp_path / "cache")
    np.testing.assert_array_equal(found.sample(1, seed=3), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hflow_rt.load(tmp_path / "run" / "model.safetensors")
    (tmp_path / "other.bin").write_bytes(b"no model")
    with pytest.raises(hflow_rt.errors.CheckpointError), pytest.warns(UserWarning, match="making one in"):
        hflow_rt.load(tmp_path / "other.bin")
    assert [path.name for path in (tmp_path / "cache" / "hflow-rt" / "imported").iterdir()] == [
        found.bundle.path.parent.name
    ]


# docs/api.md


API = (ROOT / "docs" / "api.md").read_text()


def signature(name: str, function: Any) -> str:
    """As docs/api.md prints it: names and defaults."""
    words = []
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        callback = callable(parameter.default) and parameter.default is not parameter.empty
        default = "" if parameter.default is parameter.empty else "=..." if callback else f"={parameter.default!r}"
        words.append(f"{star}{parameter.name}{default}".replace("'", '"'))
    return f"`{name}({', '.join(words)})`"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Session", "errors")])
def test_functions_are_documented(name: str) -> None:
    assert f"## `hflow_rt.{name}`\n\n{signature(f'hflow_rt.{name}', getattr(hflow_rt, name))}\n" in API


@pytest.mark.parametrize("name", PUBLIC)
def test_sessions_are_documented(name: str) -> None:
    found = inspect.getattr_static(Session, name)
    assert found.__doc__
    if isinstance(found, property):
        assert f"\n| `{name}` | " in API
    else:
        assert f"\n#### {signature(f'session.{name}', found)}\n" in API


def test_errors_are_documented() -> None:
    for name in [*NAMES, *hflow_rt.errors.__all__]:
        assert name in API


def test_examples_of_the_page_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; what is proved of engines by the examples in docstrings is not proved again."""
    report = {"passed": True, "backend": "onnxruntime CPUExecutionProvider"}
    monkeypatch.setattr("hflow_rt.export.bundle.run_parity", lambda *arguments, **options: report)
    found: dict[str, Any] = {}
    exec("\n".join(code_blocks(API)), found)
    printed = capsys.readouterr().out
    assert "<Session: hflow 64x64 on onnxruntime CPUExecutionProvider, verified" in printed
    assert "True onnxruntime CPUExecutionProvider" in printed
    assert found["result"].run == Path("runs/x")
    assert found["bundle"] == Path("runs/my-run/bundle")
    assert (folder / "again.png").is_file()
    assert (folder / "samples.png").is_file()


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    """Without torch the names are there, and a call says what to install."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "import hflow_rt\n"
        "for call in (hflow_rt.train, hflow_rt.check, lambda: hflow_rt.export(hflow_rt.pretrained(), out='x')):\n"
        "    try:\n        call()\n"
        "    except hflow_rt.errors.BackendUnavailable as error:\n        print(error)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    needs = "needs torch: pip install 'hflow-rt[train]'"
    assert done.stdout.splitlines() == [f"training {needs}", f"checking {needs}", f"exporting {needs}"]
    assert not list(tmp_path.iterdir())
