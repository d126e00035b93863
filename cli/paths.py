"""Where a command would write, looked at before it runs: nothing that people have may be lost by it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hflow_rt.errors import DataError
from hflow_rt.files import destination, is_file, is_folder, is_ours

__all__ = ["OUTPUTS", "check_paths"]

# options that name what is written; every other path is read
OUTPUTS = frozenset({"--output", "--out", "--picture", "--latents", "--video", "--trajectory", "--by-step"})
# parameters that name a model: what lies beside its parts in its folder is free to be written again
_MODELS = ("model", "run", "start")
# what commands write and folders of images hold; nothing else in such a folder is read
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def check_paths(context: Any) -> None:
    """Raise `DataError` for an output that is no place for a file, an input, a part of a model, or somebody's file.

    context: of the command about to run, of click.
    """
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.runs import CHECKPOINTS, RUN

    outputs: list[tuple[Any, list[Path]]] = []
    inputs: list[tuple[Any, list[Path]]] = []
    for parameter in context.command.params:
        found = list(_paths(context.params.get(parameter.name)))
        (outputs if OUTPUTS.intersection(parameter.opts) else inputs).append((parameter, found))
    if any(str(path) == "-" for _, paths in inputs for path in paths):
        raise DataError("standard input is not read; name a file")
    for parameter, paths in outputs:
        typed = context.get_parameter_source(parameter.name).name != "DEFAULT"
        for path in paths:
            place = destination(path)
            if not is_file(place):
                continue
            if place.name in (MANIFEST, MODEL, RUN) or place.parent.parent.name == CHECKPOINTS:
                raise DataError(f"cannot write {path}: that is a part of a model; choose another name")
            for source, read in inputs:
                _keep(path, place, read, images=source.name not in _MODELS)
            if not typed and not is_ours(place):
                option = parameter.opts[0]
                raise DataError(
                    f"{path} exists, was not written by hflow-rt and was not named; choose another name with {option},"
                    " or that one to replace it"
                )


def _keep(path: Path, place: Path, inputs: Iterable[Path], images: bool) -> None:
    """Raise `DataError` if `place` is one of the inputs, or lies in one that is a folder of images."""
    for given in inputs:
        whole = Path(os.path.realpath(given))
        if place == whole or (is_file(given) and place.samefile(given)):
            raise DataError(f"cannot write {path}: it is an input; choose another name")
        if not (images and path.suffix.lower() in _PICTURES and is_folder(given)):
            continue
        linked = (one for one in given.rglob(f"*{place.suffix}") if one.is_symlink() and is_file(one))
        among = place.is_relative_to(whole) or any(place.samefile(one) for one in linked)
        if among and not is_ours(place):
            raise DataError(f"cannot write {path}: it lies in {given}, which is read; choose another name")


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _paths(one)
