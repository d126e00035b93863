"""What was proved is remembered for as long as nothing changes that it depends on, and only then."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import mixing, proof_records
from hflow_rt.kernels.blur import blur_up
from hflow_rt.kernels.mixing import mixing_reference
from hflow_rt.kernels.proof_records import Environment


def mix(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = mixing.mixing(x, weight)
    return y


def test_the_second_process_pays_nothing(remembering: Any, x: Tensor, weight: Tensor) -> None:
    for _ in range(2):
        mix(x, weight)
    assert remembering.proofs == ["mixing"]
    remembering.restarted()
    mix(x, weight)
    assert remembering.proofs == []
    blur_up(x)
    assert remembering.proofs == ["blur_up"]


@pytest.mark.parametrize("changed", [field.name for field in dataclasses.fields(Environment)])
def test_whatever_changes_is_proved_anew(changed: str, remembering: Any, x: Tensor, weight: Tensor) -> None:
    mix(x, weight)
    remembering.restarted().environment = dataclasses.replace(remembering.known, **{changed: "another"})
    mix(x, weight)
    assert remembering.proofs == ["mixing"]
    assert len(remembering.files()) == 2
    remembering.restarted().environment = remembering.known
    mix(x, weight)
    assert remembering.proofs == []


DAMAGED = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-9],
    "no text": lambda text: b"\xff\xfe" + text,
    "a list": lambda text: b"[]",
    "deep": lambda text: b"[" * 100_000,
    "another operator": lambda text: text.replace(b'"mixing"', b'"coupling"'),
    "another GPU": lambda text: text.replace(b"A GPU", b"B GPU"),
    "no date": lambda text: text.replace(b'"date": ', b'"day": '),
    "no text for a failure": lambda text: text.replace(b'"failure": ""', b'"failure": null'),
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_file_is_a_proof_and_then_whole(damage: str, remembering: Any, x: Tensor, weight: Tensor) -> None:
    mix(x, weight)
    (path,) = remembering.files()
    whole = path.read_bytes()
    path.write_bytes(DAMAGED[damage](whole))
    assert path.read_bytes() != whole
    remembering.restarted()
    mix(x, weight)
    assert remembering.proofs == ["mixing"]
    assert json.loads(path.read_bytes())["failure"] == ""
    remembering.restarted()
    mix(x, weight)
    assert remembering.proofs == []


def test_a_folder_that_cannot_be_written_is_no_failure(
    remembering: Any, x: Tensor, weight: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    for cache in (tmp_path / "file", Path("/dev/null"), Path("~/.cache")):  # the last as without a home folder
        remembering.restarted().cache = cache
        for _ in range(2):
            mix(x, weight)
        assert remembering.proofs == ["mixing"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_is_kept_for_doctor_and_tried_again_by_the_next_process(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        on_new_gpu.harms(mixing, ("_mix", "y"), wrong)
        with pytest.raises(BackendUnavailable):
            mix(x, weight)
    (kept,) = on_new_gpu.kept()
    assert kept["failure"].startswith("computes wrong: result, ")
    with pytest.raises(BackendUnavailable):
        mix(x, weight)
    on_new_gpu.restarted()
    assert torch.allclose(mix(x, weight), mixing_reference(x, weight), atol=1e-6)
    assert on_new_gpu.proofs == ["mixing"]
    assert [kept["failure"] for kept in on_new_gpu.kept()] == [""]


def test_the_oldest_records_go(on_new_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_records, "_KEPT", 3)
    for number in range(5):
        where = dataclasses.replace(on_new_gpu.known, driver=str(number))
        proof_records.keep(proof_records.Record("mixing", where, "2026-01-01 00:00"))
        for path in on_new_gpu.files():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
    assert sorted(kept["environment"]["driver"] for kept in on_new_gpu.kept()) == ["2", "3", "4"]


def test_the_digest_is_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = proof_records._source.__wrapped__
    assert source() == source() == proof_records.environment(torch.device("cpu")).kernels
    monkeypatch.setattr(proof_records, "__file__", str(tmp_path / "proof_records.py"))
    digests = set()
    for name, text in (("a.py", "1"), ("b.py", "2"), ("b.py", "3"), ("note.txt", "4")):
        (tmp_path / name).write_text(text)
        digests.add(source())
    assert len(digests) == 3
