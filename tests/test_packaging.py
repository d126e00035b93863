"""What is installed: every module of every folder; what imports what; and a runtime that needs no torch."""

import ast
import graphlib
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
HEAVY = ("torch", "onnx", "onnxscript", "triton", "accelerate", "tensorboard", "av")

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def modules() -> Iterator[tuple[str, Path]]:
    """Import name and file of every module of the project."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__"), path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_file) as opened:
        yield opened


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.endswith(".py")}
    expected = {
        (Path(*package.split(".")) / path.relative_to(folder)).as_posix()
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert held == expected
    for name in (
        "hflow_rt/kernels/coupling.py",
        "hflow_rt/export/parity.py",
        "hflow_rt/runtime/session.py",
        "hflow_rt/cli/app.py",
    ):
        assert name in held


def test_the_wheel_holds_what_is_not_code(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    assert "hflow_rt/py.typed" in held
    assets = ROOT / "hflow_rt" / "assets"
    for path in assets.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"hflow_rt/assets/{path.relative_to(assets).as_posix()}" in held
    assert wheel.getinfo("hflow_rt/assets/emoji.zip").file_size <= 3_000_000
    assert sum(one.compress_size for one in wheel.infolist()) <= 40_000_000
    assert any(name.endswith("licenses/LICENSE") for name in held)
    entry_points = next(name for name in held if name.endswith("entry_points.txt"))
    assert "hflow-rt = hflow_rt.cli.__main__:main" in wheel.read(entry_points).decode()
    assert {name.split("/")[0].partition("-")[0] for name in held} == {"hflow_rt"}


def test_the_wheel_runs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import hflow_rt; print(hflow_rt.__file__);"
        "from hflow_rt.cli.__main__ import main; main()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "site"), "sample", "--help"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "site"))
    assert "Usage: hflow-rt sample" in result.stdout


def test_every_package_is_listed() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == {name for name, path in modules() if path.name == "__init__.py"}


def imported(name: str, path: Path, deep: bool) -> set[str]:
    """Modules that a file imports, absolute; with `deep` also those inside functions, never those for types only."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


RULES = {
    # package: what it may not import anywhere, what it may not import when it is imported
    "hflow_rt": (("hflow_rt.bench", "hflow_rt.export", "hflow_rt.runtime", "hflow_rt.cli"), ()),
    "hflow_rt.kernels": (("hflow_rt.bench", "hflow_rt.export", "hflow_rt.runtime", "hflow_rt.cli"), ()),
    "hflow_rt.export": (("hflow_rt.bench", "hflow_rt.cli"), ()),
    "hflow_rt.bench": (("hflow_rt.cli",), (*HEAVY, "onnxruntime")),
    "hflow_rt.runtime": (("hflow_rt.export", "hflow_rt.bench", "hflow_rt.cli"), (*HEAVY, "onnxruntime")),
    "hflow_rt.cli": ((), (*HEAVY, "onnxruntime", "numpy", "PIL", "hflow_rt.export", "hflow_rt.models")),
}


def owner(module: str) -> str:
    return max((package for package in FOLDERS if within(module, (package,))), key=len)


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_imports_point_one_way(package: str) -> None:
    never, not_at_once = RULES[package]
    checked = [(name, path) for name, path in modules() if owner(name) == package]
    assert checked
    wrong = [
        f"{name} imports {other}"
        for name, path in checked
        for forbidden, deep in ((never, True), (not_at_once, False))
        for other in imported(name, path, deep)
        if within(other, forbidden)
    ]
    assert wrong == []


# a kernel asks for its proof when it first runs, and the proof runs kernels
LATER = {("hflow_rt.kernels.dispatch", "hflow_rt.kernels.proof")}


def test_no_file_needs_a_file_that_needs_it() -> None:
    """Not even inside functions."""
    files = dict(modules())
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        named = imported(name, path, deep=True)
        found = {other if other in files else other.rpartition(".")[0] for other in named} & files.keys()
        graph[name] = {other for other in found - {name} if (name, other) not in LATER}
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_rule_is_able_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "if TYPE_CHECKING:\n import a\nimport b\ndef f():\n from c import d\n"
        "class C:\n try:\n  import e\n finally: pass\n"
    )
    assert imported("a", path, deep=False) == {"b", "e"}
    assert imported("a", path, deep=True) == {"b", "c.d", "e"}


SAMPLE = """
import sys
import numpy as np
from hflow_rt.runtime import load

session = load(sys.argv[1])
images = session.sample(3, std=0.7, seed=5)
latents = session.inverse(images).latents
back = session.forward(latents)
assert np.abs(back - images).max() < 1e-3, np.abs(back - images).max()
np.save(sys.argv[2], images)
"""


def isolated(code: str, *arguments: object, blocked: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=blocked) + code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=60,
    )


def test_a_machine_without_torch_runs_a_bundle(tiny_run: Path, tmp_path: Path) -> None:
    import numpy as np

    from hflow_rt.runtime import load

    result = isolated(SAMPLE, tiny_run, tmp_path / "images.npy", blocked=HEAVY, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(
        np.load(tmp_path / "images.npy"), load(tiny_run, "torch", "cpu").sample(3, 0.7, 5), atol=1e-4
    )


@pytest.mark.parametrize("command", ["sample", "info", "interpolate", "encode", "decode"])
def test_commands_that_run_a_bundle_need_no_torch(tiny_run: Path, tmp_path: Path, command: str) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    arguments = {
        "sample": ("sample", tiny_run, "-n", 2),
        "info": ("info", tiny_run),
        "interpolate": ("interpolate", "a.png", "a.png", "--model", tiny_run, "-o", "walk.gif"),
        "encode": ("encode", "a.png", "--model", tiny_run),
        "decode": ("decode", "z.safetensors", "--model", tiny_run),
    }
    code = "from hflow_rt.cli.__main__ import main; main()"
    if command == "decode":
        first = ("sample", tiny_run, "-n", 2, "--latents", "z.safetensors")
        assert isolated(code, *first, blocked=HEAVY, folder=tmp_path).returncode == 0
    result = isolated(code, *arguments[command], blocked=HEAVY, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "next: hflow-rt" in result.stdout


def test_without_an_engine_one_line_says_what_to_install(tiny_run: Path, tmp_path: Path) -> None:
    code = "from hflow_rt.cli.__main__ import main; main()"
    result = isolated(code, "sample", tiny_run, blocked=(*HEAVY, "onnxruntime"), folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: the onnx backend needs ONNX Runtime: pip install 'hflow-rt[cpu]' (or [gpu])\n"
