"""Hostile nesting of dictionaries around the weights, and hostile names of entries and prefixes."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from generators import (
    BUILD,
    CLASSES,
    EMPTY_DICT,
    EMPTY_TUPLE,
    MARK,
    NEWOBJ,
    NONE,
    call,
    dict_of,
    integer,
    list_of,
    name,
    stream,
    tensor,
    text,
    tuple_of,
)

from hflow_rt.foreign.parts import Naming
from hflow_rt.foreign.states import read_weights

ONE = {"0": (1, b"\0\0\0\0")}
W = tensor("0", 1, [1])
NETS = Naming(r"net\.", "net..., as these tests do")
EVIL = "\x1b[2J\x1b]0;pwn\x07\n"


def read(path: Path) -> object:
    return read_weights(path, CLASSES, NETS)


def put(index: int) -> bytes:
    """Keep the value on top of the stack."""
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def below(depth: int, value: bytes) -> bytes:
    for _ in range(depth):
        value = dict_of({"a": value})
    return value


def test_dictionaries_are_looked_into_to_a_depth(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(stream(below(8, dict_of({"net.w": W})), ONE))
    found = read_weights(path, (), NETS)
    assert list(found.weights) == ["net.w"]
    assert found.name == ".".join("a" * 8)
    for depth in (9, 20_000):
        deep = (EMPTY_DICT + text("a")) * depth + dict_of({"net.w": W}) + b"s" * depth
        refused(stream(deep, ONE), "holds a (a dictionary); give a file that holds weights by name", reader=read)


def test_dictionaries_that_hold_themselves(refused: Callable[..., str], tmp_path: Path) -> None:
    itself = EMPTY_DICT + put(0) + MARK + text("a") + get(0) + text("b") + get(0)
    refused(stream(itself + b"u"), "holds a (a dictionary), b (a dictionary); give", reader=read)
    path = tmp_path / "x.pt"
    path.write_bytes(stream(itself + text("model") + dict_of({"net.w": W, "up": get(0)}) + b"u", ONE))
    found = read_weights(path, (), NETS)
    assert (list(found.weights), found.name) == (["net.w"], "model")
    assert found.passed_over == {"a": "a dictionary", "b": "a dictionary", "model.up": "a dictionary"}


def test_dictionaries_that_double_at_every_level(refused: Callable[..., str]) -> None:
    value = dict_of({"w": W}) + put(0)
    for level in range(60):
        value += b"0" + dict_of({f"d{i}": get(level) for i in range(10)}) + put(level + 1)
    refused(stream(value, ONE), "holds d0 (a dictionary), d1 (a dictionary)", reader=read)


def test_too_many_dictionaries(refused: Callable[..., str]) -> None:
    many = MARK + b"".join(text(str(i)) + EMPTY_DICT for i in range(100_000)) + b"u"
    message = "must hold at most 100,000 dictionaries; refused"
    refused(stream(EMPTY_DICT + many), message, reader=read, measure=False)


@pytest.mark.parametrize("kind", [EMPTY_DICT, NONE, integer(5)])
def test_many_entries_cost_time_by_their_number(kind: bytes, tmp_path: Path) -> None:
    """What is passed over is listed to a length and then counted."""
    many = MARK + b"".join(text(str(i)) + kind for i in range(30_000)) + b"u"
    path = tmp_path / "x.pt"
    path.write_bytes(stream(EMPTY_DICT + MARK + text("model") + dict_of({"net.w": W}) + b"u" + many, ONE))
    found = read_weights(path, (), NETS)
    assert len(found.passed_over) == 17
    assert found.passed_over["..."] == "29,984 more"


def test_many_tensors_outside_the_network(refused: Callable[..., str], tmp_path: Path) -> None:
    names = "".join
    many = W + put(0) + b"0" + dict_of({f"n{i}.w": get(0) for i in range(5_000)} | {"m.net.w": get(0)})
    path = tmp_path / "x.pt"
    path.write_bytes(stream(many, ONE))
    found = read_weights(path, (), NETS)
    assert (list(found.weights), found.prefix) == (["net.w"], "m.")
    assert found.passed_over["n0"] == "1 tensor"
    assert found.passed_over["..."] == "4,984 more"
    deep = names("a." for _ in range(450))
    many = W + put(0) + b"0" + dict_of({f"{deep}n{i}.net.w": get(0) for i in range(1_000)})
    refused(stream(many, ONE), "holds 1,000 networks (a.a.a", "; choose one with --part NAME", reader=read)
    many = W + put(0) + b"0" + dict_of({f"net.w{i}": get(0) for i in range(20_001)})
    refused(stream(many, ONE), "must hold at most 20,000 tensors, not 20,001; refused", reader=read)


def test_a_long_list_that_many_entries_share(tmp_path: Path) -> None:
    shared = list_of(*[W, *[NONE] * 50_000]) + put(0) + b"0"
    entries = dict_of({"model": dict_of({"net.w": W})} | {f"l{i}": get(0) for i in range(20_000)})
    path = tmp_path / "x.pt"
    path.write_bytes(stream(shared + entries, ONE))
    found = read_weights(path, (), NETS)
    assert found.passed_over["l0"] == "a list of 50,001 (a single tensor, nothing)"


def test_modules_of_all_entries_share_one_limit(refused: Callable[..., str]) -> None:
    parts = {"_parameters": dict_of({f"p{i}": NONE for i in range(900)}), "_buffers": EMPTY_DICT}
    made = name("hflow.network", "Step") + EMPTY_TUPLE + NEWOBJ
    parts["_modules"] = EMPTY_DICT
    inner = made + dict_of(parts) + BUILD + put(0) + b"0"
    above = {"_parameters": EMPTY_DICT, "_buffers": EMPTY_DICT, "_modules": dict_of({"m": get(0)})}
    value = dict_of({f"k{i}": made + dict_of(above) + BUILD for i in range(120)})
    refused(stream(inner + value), "or have more than 100,000 entries", reader=read)


@pytest.mark.parametrize("key", [EVIL, EVIL * 100, "a" * 100_000, "\u202eabc", "ключ"])
def test_keys_cannot_write_to_the_terminal(refused: Callable[..., str], tmp_path: Path, key: str) -> None:
    refused(stream(dict_of({key: NONE})), " (nothing); give", reader=read)
    refused(stream(dict_of({key: dict_of({"w": W})}), ONE), "must name its tensors net..., as these", reader=read)
    two = dict_of({key: dict_of({"net.w": W}), key + "b": dict_of({"net.w": W})})
    refused(stream(two, ONE), "holds 2 networks (", "; choose one with --part NAME", reader=read)
    path = tmp_path / "x.pt"
    path.write_bytes(stream(dict_of({key: dict_of({"net.w": W, key: NONE}), f"{key}c": W}), ONE))
    found = read_weights(path, (), NETS)
    said = [found.name, found.prefix, *found.passed_over, *found.passed_over.values()]
    assert all(text.isprintable() and text.isascii() and len(text) <= 90 for text in said)


@pytest.mark.parametrize("prefix", [f"{EVIL}.", "a b.", "\u202e.", "ö.", "x/../y.", "\0."])
def test_a_prefix_of_odd_characters_is_none(refused: Callable[..., str], prefix: str) -> None:
    refused(stream(dict_of({f"{prefix}net.w": W}), ONE), "must name its tensors net..., as these tests do", reader=read)
    header = json.dumps({f"{prefix}net.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    refused(struct.pack("<Q", len(header)) + header + b"\0" * 4, "must name its tensors net...", reader=read)
    inside = dict_of({f"net.{prefix}w": W})
    refused(stream(inside, ONE), "is no plain name of a tensor; refused", reader=read)


def test_what_asks_for_no_part_that_is_there(refused: Callable[..., str]) -> None:
    value = stream(dict_of({"g": dict_of({"net.w": W}), "a": dict_of({"b": dict_of({"net.w": W})}), "a.b": NONE}), ONE)

    def asking(part: str) -> Callable[[Path], object]:
        return lambda path: read_weights(path, CLASSES, NETS, part)

    refused(value, "has no weights called d; --part must be one of g, a.b", reader=asking("d"))
    refused(value, "has no weights called \\x1b[2J", reader=asking(EVIL))
    refused(value, "has no weights called ; --part must be", reader=asking(""))
    twice = dict_of({"a.b": dict_of({"net.w": W}), "a": dict_of({"b": dict_of({"net.w": W})})})
    refused(stream(twice, ONE), "has 2 entries called a.b; save one of them alone", reader=asking("a.b"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (call(name("collections", "Counter"), integer(1)), "a Counter is made of odd arguments"),
        (call(name("torch", "device"), integer(1)), "a device is made of odd arguments"),
        (call(name("argparse", "Namespace")), "a call of argparse.Namespace"),
        (name("argparse", "Action") + EMPTY_TUPLE + NEWOBJ, "asks for argparse.Action"),
        (EMPTY_DICT + tuple_of(integer(1)) + NONE + b"s", "asks for a tuple as a key"),
    ],
)
def test_what_stands_beside_weights_stays_inert(refused: Callable[..., str], value: bytes, reason: str) -> None:
    refused(stream(value), reason, reader=read)
