"""Places where nothing can be written: one line, exit code 1, nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import refused, tree

Command = Callable[..., Any]


@pytest.mark.parametrize("output", ["a.bmp", "a.txt", "a.PNG.part"])
def test_a_picture_of_unknown_kind(hflow: Command, run: Path, output: str) -> None:
    refused(
        hflow("sample", "-n", 1, "-o", output),
        f"a picture's name must end in .png, .jpg, .jpeg, .webp; found '{output}'",
    )
    refused(hflow("interpolate", "-o", output), f"an animation must end in .gif, .webp, .mp4, .png; found '{output}'")


def writing(output: Path) -> dict[str, tuple[object, ...]]:
    """Every command that writes, told to write at `output`."""
    return {
        "grid": ("sample", "-n", 4, "-o", output.with_suffix(".png")),
        "folder": ("sample", "-n", 4, "-o", output),
        "latents": ("sample", "-n", 4, "-o", "/dev/null/never.png", "--latents", output.with_suffix(".safetensors")),
        "encode": ("encode", "a.png", "-o", output.with_suffix(".safetensors")),
        "gif": ("interpolate", "-o", output.with_suffix(".gif")),
        "mp4": ("interpolate", "-o", output.with_suffix(".mp4")),
        "dataset": ("dataset", "a", "-o", output.with_suffix(".npy"), "--resolution", 16),
        "train": ("train", "--images", 16, "--out", output),
        "export": ("export", "-o", output),
    }


KINDS = sorted(writing(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_below_a_file(hflow: Command, run: Path, photo: Command, kind: str) -> None:
    shutil.copytree(photo("a/a.png").parent, "b")
    photo("a.png")
    before = tree()
    refused(hflow(*writing(Path("a.png/deep/made"))[kind]), "a folder on the way is a file; choose another place")
    assert tree() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("folder", "train", "export", "latents")])
def test_an_output_that_is_a_folder(hflow: Command, run: Path, photo: Command, kind: str) -> None:
    photo("a/a.png")
    photo("a.png")
    arguments = writing(Path("made"))[kind]
    target = next(word for word in arguments if isinstance(word, Path))
    (target / "inside").mkdir(parents=True)
    before = tree()
    refused(hflow(*arguments), f"cannot write {target}: Is a directory")
    assert tree() == before


FULL = """
import resource, sys
from hflow_rt.cli.__main__ import main
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # writing beyond fails as on a full disk
main()
"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "latents"])
def test_a_full_disk(python: Command, run: Path, photo: Command, kind: str) -> None:
    photo("a/a.png")
    photo("a/b.png")
    photo("a.png", 60, 60)
    before = tree()
    result = python(FULL, 50_000 if kind == "export" else 300, *writing(Path("made"))[kind])
    refused(result, "cannot write made", ": File too large; free space or choose another place")
    assert tree() - before <= {"made"}  # at most an empty folder
    assert kind != "export" or not Path("made").exists()


def test_a_full_disk_keeps_the_bundle_that_was_there(python: Command, run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()}
    refused(python(FULL, 50_000, "export", "--route", "inverse"), f"cannot write {run}/bundle: ")
    assert {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()} == before
