"""A package that is not installed is one line, one that is broken another."""

import importlib
import sys
from pathlib import Path

import pytest

from hflow_rt.errors import BackendUnavailable
from hflow_rt.extras import needed


def imported(package: str) -> None:
    with needed(package, f"pip install {package}"):
        importlib.import_module(package)


def test_missing_and_broken_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_one.py").write_text("import libnothing_so_6\n")
    (tmp_path / "broken_two.py").write_text("raise ImportError('libx.so.6: cannot open shared object file')\n")
    with pytest.raises(BackendUnavailable, match=r"^pip install absent_one$"):
        imported("absent_one")
    with pytest.raises(BackendUnavailable, match=r"broken_one is installed and cannot be loaded .*libnothing_so_6"):
        imported("broken_one")
    with pytest.raises(BackendUnavailable, match=r"broken_two is installed and cannot be loaded .*libx.so.6"):
        imported("broken_two")
    imported("json")


def test_an_interrupted_import_is_no_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_one.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        imported("slow_one")
    sys.modules.pop("slow_one", None)
