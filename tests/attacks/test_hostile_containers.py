"""Hostile containers, zips and safetensors: cut, stretched, lying about sizes, changed at random."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from generators import (
    ADAM,
    EMPTY_DICT,
    EMPTY_LIST,
    NETWORK,
    STOP,
    container,
    dict_of,
    sized,
    small,
    stream,
    tensor,
    text,
    zipped,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.states import read_weights
from hflow_rt.models.hflow.published import read_published

# the container


def test_truncation(tmp_path: Path) -> None:
    """At the end of every pickle, of every length and of every part, beside them, and at every fifth byte."""
    whole = small()
    ends = {index + 1 for index in range(len(whole)) if whole[index : index + 1] == STOP}
    ends |= {4, 17, 21, whole.index(b"\x80\x02"), whole.rindex(b'{"MODEL'), len(whole) - 2}
    path = tmp_path / "cut.bin"
    counted = {CheckpointError: 0, ConfigError: 0}
    lengths = {end + i for end in ends for i in (-4, -1, 0, 1, 8)} | set(range(0, len(whole), 5))
    lengths -= {length for length in lengths if length >= len(whole)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            read_published(path)
        counted[caught.type] += 1
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    # only the file that ends where the optional settings would begin is whole
    assert counted == {CheckpointError: len(lengths) - 1, ConfigError: 1}


def test_more_than_a_whole_container(refused: Callable[..., str]) -> None:
    refused(small() + b"x", "bytes of settings must end it", reader=read_published)


def test_an_optimizer_that_is_none(refused: Callable[..., str]) -> None:
    content = container(NETWORK, stream(EMPTY_LIST), b"{}")
    refused(content, "the optimizer's state is no dictionary", reader=read_published)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (b"", "no usable JSON"),
        (b"{", "no usable JSON"),
        (b"words", "no usable JSON"),
        (b"\xff\xfe", "no usable JSON"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"[" * 100_000, "no usable JSON (nested too deep)"),
        (b'{"a":' * 400 + b"1" + b"}" * 400, "nested deeper than 16"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "a number must be within"),
        (b'{"a": 1' + b"0" * 400 + b"}", "a number must be within"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "no usable JSON"),
        (b'{"a": [' + b"1," * 20_000 + b"1]}", "more than 10,000 values"),
        (b" " * (2 << 20), "at most 1 MB"),
        (b"{}", "need ENDBLOCK_SETTINGS, which is missing"),
        (b'{"GENERAL": 1}', "a value of an unexpected kind"),
        (b'{"MODEL_PARAMETERS": [1]}', "a value of an unexpected kind"),
        (b'{"MODEL_PARAMETERS": {"RESOLUTIONS": [100000]}}', "need ENDBLOCK_SETTINGS, which is missing"),
        (b'{"MODEL_PARAMETERS": {}, "model_parameters": {}}', "hold MODEL_PARAMETERS in two spellings; keep one"),
        (b'{"\\u001b[2J": 1, "\\u001b[2j": 1}', "hold \\x1b[2J in two spellings"),
    ],
)
def test_settings_that_are_none(refused: Callable[..., str], settings: bytes, reason: str) -> None:
    refused(container(NETWORK, ADAM, settings), reason, reader=read_published)


# zip


def test_compressed_entries_are_refused(refused: Callable[..., str]) -> None:
    bomb = zipped(text("x" * 20_000_000), {}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    refused(bomb, "its zip holds compressed entries, which torch.save never writes")
    lying = bytearray(bomb)  # says that it is stored
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = lying.find(signature)
        lying[start + at : start + at + 2] = b"\0\0"
    refused(bytes(lying), "its zip holds compressed entries")


def test_sizes_that_the_directory_only_claims(refused: Callable[..., str]) -> None:
    whole = bytearray(zipped(EMPTY_DICT, {"0": b"1234"}))
    start = whole.rfind(b"PK\x01\x02")
    whole[start + 20 : start + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    refused(bytes(whole), "its zip declares more than the file holds")


def test_zips_of_something_else(refused: Callable[..., str]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../etc/data.pkl", b"x")
        archive.writestr("a.txt", b"x")
    refused(buffer.getvalue(), "is a zip, but not of torch.save")
    refused(b"PK\x03\x04 and then nothing", "File is not a zip file")
    refused(b"PK\x05\x06" + b"\0" * 18, "is a zip, but not of torch.save")
    refused(b"PK" + b"PK\x01\x02" * 100_001, "its zip must have at most 100,000 entries")
    buffer = io.BytesIO(zipped(EMPTY_DICT, {}))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/byteorder", "big")
    refused(buffer.getvalue(), "holds big-endian numbers")
    encrypted = bytearray(zipped(EMPTY_DICT, {}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.find(signature) + at] |= 1
    refused(bytes(encrypted), "not a whole model file")


def test_a_zip_cut_anywhere(tmp_path: Path) -> None:
    whole = zipped(dict_of({"w": tensor("0", 1, [1])}), {"0": b"\0" * 4})
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_weights(path)


# safetensors


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4398046511104]}}',
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":' * 10_000,
        b"{",
        b'{"a\\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\\u001b[31m":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_safetensors(refused: Callable[..., str], header: bytes) -> None:
    refused(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(struct.pack("<Q", 1 << 60) + header + b"\0" * 4)


@pytest.mark.parametrize(("kind", "size"), [("F4", 4), ("F8_E8M0", 8), ("F8_E4M3", 8), ("F8_E5M2", 8), ("U16", 16)])
def test_kinds_of_numbers_that_no_weights_have(refused: Callable[..., str], kind: str, size: int) -> None:
    header = json.dumps({"w": {"dtype": kind, "shape": [8], "data_offsets": [0, size]}}).encode()
    refused(struct.pack("<Q", len(header)) + header + b"\0" * size, f"w is of kind {kind}, which is none of F64, F32")


# chance


def survives(content: bytes, path: Path) -> None:
    """Reading ends with a value or one line, nothing else."""
    path.write_bytes(content)
    message = ""
    try:
        read_published(path)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
    assert message.isprintable()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chance") / "file.bin"


FEW = hypothesis_settings(max_examples=150, deadline=None, derandomize=True)


@FEW
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", sized(b"hflow.network") + sized(b"")])
)
def test_random_bytes(scratch: Path, content: bytes, start: bytes) -> None:
    survives(start + content, scratch)


@FEW
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_changes(scratch: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(small())
    for place, value in changes:
        content[place % len(content)] = value
    survives(bytes(content), scratch)


@FEW
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_changes_of_a_zip(scratch: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(zipped(dict_of({"w": tensor("0", 1, [1])}), {"0": b"\0" * 4}))
    for place, value in changes:
        content[place % len(content)] = value
    survives(bytes(content), scratch)
