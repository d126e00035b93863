"""Shared code names no family, preset, space or latent of one: it reads what a family describes."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hflow_rt.models.registry import FAMILIES, family

ROOT = Path(__file__).parents[1]
FOLDERS = ("hflow_rt", "kernels", "export", "runtime", "cli", "benchmarks/bench")
REGISTRY = "hflow_rt/models/registry.py"
ASSETS = "hflow_rt/assets/"  # the bundled model, which is of a family, and its pictures
# where a formula is from, as one would name a paper
CITATION = re.compile(r"\b\w+ spec \d[\d.]*(?:-[\d.]+)?(?: and [\d.]+)?")
WORD = re.compile(r"(?<![\w|])[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*")  # `|u1` is a type of numpy


def shared() -> Iterator[Path]:
    """Every file of the package that belongs to no family."""
    own = tuple(f"hflow_rt/models/{path.name}/" for path in (ROOT / "hflow_rt" / "models").iterdir() if path.is_dir())
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.relative_to(ROOT).as_posix().startswith((*own, REGISTRY, ASSETS)):
                yield path


def named(text: str, words: set[str]) -> list[str]:
    """The words that a text names, citations aside, in any case."""
    return [word for word in WORD.findall(CITATION.sub("", text)) if word.lower() in words]


def test_no_family_or_preset_is_named() -> None:
    words = {word for name in FAMILIES for word in (name, *family(name).presets)}
    paths = list(shared())
    assert len(paths) > 150
    found = {path.relative_to(ROOT).as_posix(): named(path.read_text(), words) for path in paths}
    assert {path: words for path, words in found.items() if words} == {}


def test_no_latent_or_space_of_one_family_is_named() -> None:
    """Those that several have, such as z0, are examples."""
    pytest.importorskip("torch")
    from hflow_rt.models.checkpoint import build_model

    names: list[str] = []
    for name in FAMILIES:
        model = build_model(name, family(name).tiny["model"])
        graphs, spaces = model.graphs(), model.spaces()
        inside = {
            tensor.name for space in spaces.values() for graph in space.graphs for tensor in graphs[graph].outputs
        }
        names += {*model.latent_shapes(), *spaces, *inside}
    words = {name for name, count in Counter(names).items() if count == 1 and re.search(r"\d", name)}
    assert {"y0", "u0", "end0"} <= words
    found = {path.relative_to(ROOT).as_posix(): named(path.read_text(), words) for path in shared()}
    assert {path: words for path, words in found.items() if words} == {}


def test_the_rule_is_able_to_fail() -> None:
    words = {"glow", "glow-demo", "u1"}
    assert named("hflow_rt.errors.HFlowError; glow_rt; '|u1'; (Glow spec 2.3), 2-u1", words) == []
    assert named('if name == "glow": Glow(); "glow-demo"; u1', words) == ["glow", "Glow", "glow-demo", "u1"]
