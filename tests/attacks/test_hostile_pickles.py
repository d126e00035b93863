"""Hostile pickles: each is one line of `CheckpointError`; nothing of it runs, and it costs neither time nor memory.

A test that lets something through must notice: see the marker file, and the honest files in test_honest_files.py.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generators import (
    ADAM,
    BINPERSID,
    BUILD,
    CLASSES,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    MARK,
    NETWORK,
    NEWOBJ,
    NONE,
    REDUCE,
    STOP,
    TRUE,
    call,
    container,
    dict_of,
    integer,
    list_of,
    name,
    ordered_dict,
    storage,
    stream,
    tensor,
    text,
    tuple_of,
    zipped,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.parts import Naming, part_of
from hflow_rt.foreign.pickles import unpickle
from hflow_rt.foreign.source import Source
from hflow_rt.foreign.tensors import Storages, StoredTensor, torch_vocabulary
from hflow_rt.models.hflow.published import read_published

ONE = {"0": (1, b"\0\0\0\0")}


# names


def calls(module: str, attribute: str, *arguments: bytes) -> bytes:
    return call(name(module, attribute), *arguments)


NAMES = {
    "os.system": calls("os", "system", text("touch owned")),
    "posix.system": calls("posix", "system", text("touch owned")),
    "subprocess.Popen": calls("subprocess", "Popen", list_of(text("touch"), text("owned"))),
    "builtins.eval": calls("builtins", "eval", text("open('owned', 'w')")),
    "builtins.exec": calls("builtins", "exec", text("open('owned', 'w')")),
    "__builtin__.eval": calls("__builtin__", "eval", text("open('owned', 'w')")),
    "builtins.__import__": calls("builtins", "__import__", text("this")),
    "builtins.open": calls("builtins", "open", text("owned"), text("w")),
    "builtins.bytearray": calls("builtins", "bytearray", integer(1 << 40)),
    "builtins.range": calls("builtins", "range", integer(1 << 40)),
    "builtins.list": calls("builtins", "list", list_of()),
    "builtins.getattr.__self__": calls("builtins", "getattr.__self__"),
    "operator.attrgetter": calls("operator", "attrgetter", text("__class__")),
    "functools.partial": calls("functools", "partial", name("os", "system"), text("touch owned")),
    "importlib.import_module": calls("importlib", "import_module", text("this")),
    "runpy.run_path": calls("runpy", "run_path", text("x.py")),
    "pickle.loads": calls("pickle", "loads", text("x")),
    "torch.load": calls("torch", "load", text("x")),
    "torch.hub.load": calls("torch.hub", "load", text("x")),
    "torch.storage._load_from_bytes": calls("torch.storage", "_load_from_bytes", text("x")),
    "torch._utils._rebuild_device_tensor_from_numpy": calls("torch._utils", "_rebuild_device_tensor_from_numpy"),
    "torch.nn.init._no_grad_fill_": calls("torch.nn.init", "_no_grad_fill_"),
    "torch.jit.script": calls("torch.jit", "script"),
    "numpy.load": calls("numpy", "load", text("x")),
    "numpy.core.multiarray._reconstruct": calls("numpy.core.multiarray", "_reconstruct"),
    "copyreg._reconstructor": calls("copyreg", "_reconstructor", name("os", "system"), NONE, NONE),
    "copyreg.__newobj__": calls("copyreg", "__newobj__", name("os", "system")),
    "hflow.network.os.system": calls("hflow.network", "os.system", text("touch owned")),
    "hflow.networking.Step": calls("hflow.networking", "Step"),
    "antigravity.x": name("antigravity", "x"),
    "collections.OrderedDict.fromkeys": calls("collections", "OrderedDict.fromkeys", list_of()),
}


@pytest.mark.parametrize("wanted", NAMES)
def test_a_name_that_no_model_file_needs_is_refused_by_its_name(refused: Callable[..., str], wanted: str) -> None:
    refused(stream(NAMES[wanted]), f"asks for {wanted}, which a model file never needs; refused")
    refused(zipped(NAMES[wanted], {}), f"asks for {wanted}, which")


def test_what_these_pickles_do_to_an_ordinary_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + NAMES["os.system"] + STOP)
    assert Path("owned").exists()


def test_names_built_on_the_stack_are_refused_too(refused: Callable[..., str]) -> None:
    refused(stream(text("os") + text("system") + b"\x93" + tuple_of(text("touch owned")) + REDUCE), "os.system")
    refused(stream(integer(1) + text("system") + b"\x93"), "a str is needed, a int is there")


def test_every_place_of_a_container_is_guarded(refused: Callable[..., str]) -> None:
    evil, good = stream(NAMES["os.system"]), NETWORK
    refused(container(evil, ADAM, None), "os.system", reader=read_published)
    refused(container(good, evil, None), "os.system", reader=read_published)
    for place in range(4):
        parts = [b"\x80\x02" + NAMES["os.system"] + STOP if i == place else b"" for i in range(4)]
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
        pickled = b"".join(part or whole for part, whole in zip(parts, head, strict=True))
        refused(pickled, "os.system")
    refused(b"".join([*head, b"\x80\x02" + NAMES["os.system"] + STOP]), "os.system")


def test_a_name_cannot_break_the_line_or_the_terminal(refused: Callable[..., str]) -> None:
    refused(stream(name("os", "sys\x1b[31mtem")), "asks for os.sys\\x1b[31mtem, which")
    refused(stream(name("o" * 500, "x")), "oooo...")
    refused(stream(name("o" * 2000, "x")), "a line of text has no end")
    refused(stream(name("os", r"system\x0a")), "a name holds a backslash")
    refused(stream(b"cos\n" + "größe\n".encode()), "not a whole model file")


# calls and attributes


STEP = name("hflow.network", "Step")
OBJECT = STEP + EMPTY_TUPLE + NEWOBJ
GETATTR = name("builtins", "getattr")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (call(GETATTR, OBJECT, text("__class__")), "getattr of __class__"),
        (call(GETATTR, OBJECT, text("__reduce__")), "getattr of __reduce__"),
        (call(GETATTR, OBJECT, text("__globals__")), "getattr of __globals__"),
        (call(GETATTR, OBJECT, text("a.b")), "getattr of a.b"),
        (call(GETATTR, call(GETATTR, OBJECT, text("draw")), text("im_func")), "getattr of im_func"),
        (call(GETATTR, GETATTR, text("call")), "getattr of call"),
        (call(GETATTR, STEP, text("mro")), "getattr of mro"),
        (call(GETATTR, text("x"), text("format")), "getattr of format"),
        (call(GETATTR, OBJECT, text("draw"), NONE), "getattr, which"),
        (call(call(GETATTR, OBJECT, text("draw"))), "a call of a plain value"),
        (call(STEP), "a call of hflow.network.Step"),
        (call(name("torch", "FloatStorage"), integer(1 << 40)), "a call of a plain value"),
        (call(text("os.system"), text("touch owned")), "a call of a plain value"),
        (OBJECT + EMPTY_DICT + REDUCE, "a call of a plain value"),
        (name("collections", "OrderedDict") + EMPTY_DICT + REDUCE, "a call has no tuple of arguments"),
        (STEP + tuple_of(integer(1)) + NEWOBJ, "an object made with arguments or of no class"),
        (GETATTR + EMPTY_TUPLE + NEWOBJ, "an object made with arguments or of no class"),
        (STEP + EMPTY_TUPLE + EMPTY_DICT + b"\x92", "the pickle instruction NEWOBJ_EX"),
        (OBJECT + dict_of({"__class__": NONE}) + BUILD, "setting __class__"),
        (OBJECT + dict_of({"__setstate__": GETATTR}) + BUILD, "setting __setstate__"),
        (OBJECT + dict_of({"__dict__": NONE}) + BUILD, "setting __dict__"),
        (OBJECT + tuple_of(NONE, dict_of({"name": NONE})) + BUILD, "hflow.network.Step has odd attributes"),
        (OBJECT + (EMPTY_DICT + BUILD) * 2, "hflow.network.Step has odd attributes"),
        (OBJECT + EMPTY_DICT + MARK + integer(1) + NONE + b"u" + BUILD, "an attribute without a name"),
        (STEP + EMPTY_DICT + BUILD, "attributes of a plain value"),
        (GETATTR + EMPTY_DICT + BUILD, "attributes of a plain value"),
        (storage("0", 1) + EMPTY_DICT + BUILD, "attributes of a plain value"),
        (call(name("_codecs", "encode"), text("x"), text("rot13")), "_codecs.encode to something else"),
        (call(name("_codecs", "encode"), text("\u20ac"), text("latin1")), "can't encode character"),
        (call(name("numpy", "dtype"), text("O8"), FALSE, FALSE), "a numpy dtype that is no plain number"),
        (call(name("numpy", "dtype"), text("V1000000000")), "a numpy dtype that is no plain number"),
        (call(name("numpy", "dtype"), text("f8,f8")), "a numpy dtype that is no plain number"),
        (
            call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8")), text("x")),
            "a numpy number is made of odd arguments",
        ),
        (call(name("builtins", "set"), list_of(EMPTY_TUPLE)), "a set is made of odd members"),
        (call(name("collections", "OrderedDict"), list_of()), "an OrderedDict is made of arguments"),
        (call(name("torch", "Size"), tuple_of(text("x"))), "a size is no short tuple of integers"),
    ],
)
def test_calls_and_attributes(refused: Callable[..., str], value: bytes, reason: str) -> None:
    refused(stream(value, ONE), reason)


@pytest.mark.parametrize(
    ("value", "instruction"),
    [
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"P0\n", "PERSID"),
        (b"ios\nsystem\n", "INST"),
        (MARK + b"cos\nsystem\n"[:0] + NONE + b"o", "OBJ"),
        (b"I1\n", "INT"),
        (b"S'x'\n", "STRING"),
        (b"\x96" + struct.pack("<Q", 1) + b"x", "BYTEARRAY8"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x98", "READONLY_BUFFER"),
        (NONE + b"2", "DUP"),
        (b"g0\n", "GET"),
    ],
)
def test_instructions_without_use_are_refused_by_name(
    refused: Callable[..., str], value: bytes, instruction: str
) -> None:
    refused(stream(value), f"asks for the pickle instruction {instruction}, which")


# storages and tensors


def identity(*parts: bytes) -> bytes:
    return tuple_of(*parts) + BINPERSID


FLOATS = name("torch", "FloatStorage")


@pytest.mark.parametrize(
    "value",
    [
        text("x") + BINPERSID,
        NONE + BINPERSID,
        identity(),
        identity(text("storage")),
        identity(text("storage"), FLOATS, integer(0), text("cpu"), integer(1), NONE),
        identity(text("storage"), text("FloatStorage"), text("0"), text("cpu"), integer(1), NONE),
        identity(text("storage"), FLOATS, text("0"), text("cpu"), text("1"), NONE),
        identity(text("storage"), FLOATS, text("0"), text("cpu"), integer(1), tuple_of(text("v"), NONE, NONE)),
        identity(text("module"), FLOATS, text("file"), text("source")),
        identity(text("module"), STEP, text("file"), NONE),
        identity(text("execute"), STEP, text("file"), text("source")),
    ],
)
def test_persistent_ids_of_wrong_shape(refused: Callable[..., str], value: bytes) -> None:
    refused(stream(value), "asks for a persistent id that names no storage")


def test_persistent_ids_have_no_place_in_the_small_pickles(refused: Callable[..., str]) -> None:
    refused(b"\x80\x02" + storage("0", 1) + STOP, "asks for torch.FloatStorage, which")
    refused(b"\x80\x02" + NONE + BINPERSID + STOP, "asks for a persistent id, which")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (tensor("0", 1, [2]), "a tensor of 2 values reaches out of its storage of 1"),
        (tensor("0", 1, [1], offset=1), "a tensor of 1 values reaches out"),
        (tensor("0", 1, [1], offset=-1), "odd sizes or strides"),
        (tensor("0", 1, [-1]), "odd sizes or strides"),
        (tensor("0", 1, [1], [-1]), "odd sizes or strides"),
        (tensor("0", 1, [1, 1], [1]), "odd sizes or strides"),
        (tensor("0", 1, [1 << 30], [0]), "reaches out of its storage"),
        (tensor("0", 1, [1 << 62, 4], [0, 0]), "huge sizes or strides"),
        (tensor("0", 1, [0, 1 << 62], [1, 1]), "huge sizes or strides"),
        (tensor("0", 1, [1, 1], [1 << 62, 1]), "huge sizes or strides"),
        (tensor("0", 1, [1 << 100], [1]), "huge sizes or strides"),
        (tensor("0", 1, [1] * 17), "a size is no short tuple of integers"),
        (tensor("0", 1, [0], [1], offset=2), "reaches out of its storage"),
        (tensor("0", 1, [1], kind="QInt8Storage"), "asks for torch.QInt8Storage"),
        (tensor("0", 1, [1], place="meta"), "asks for a storage on meta"),
        (tensor("0", 1, [1], place="cuda:0; rm"), "asks for a storage on cuda:0; rm"),
        (tensor("0", -1, [0]), "a storage has a negative size"),
        (list_of(tensor("0", 1, [1]), tensor("0", 2, [1])), "storage 0 is declared twice, differently"),
        (list_of(tensor("0", 1, [1]), tensor("0", 1, [1], kind="HalfStorage")), "declared twice, differently"),
        (call(name("torch._utils", "_rebuild_tensor_v2"), text("x")), "a tensor is made of odd arguments"),
        (call(name("torch._utils", "_rebuild_parameter"), text("x"), FALSE), "a parameter is made of odd arguments"),
    ],
)
def test_tensors_outside_their_storage(refused: Callable[..., str], value: bytes, reason: str) -> None:
    refused(stream(dict_of({"w": value}), ONE), reason)


def test_a_storage_of_another_size_than_declared(refused: Callable[..., str]) -> None:
    value = dict_of({"w": tensor("0", 1, [1])})
    refused(stream(value, {"0": (2, b"\0" * 8)}), "storage 0 has another size than declared")
    refused(zipped(value, {"0": b"\0" * 8}), "storage 0 has another size than declared")
    refused(zipped(value, {"0": b""}), "storage 0 has another size than declared")
    refused(zipped(value, {"1": b"\0" * 4}), "its zip lacks model/data/0")
    refused(stream(value, {"1": (1, b"\0" * 4)}), "the storages it lists are not those it uses")
    refused(stream(value, {}), "the storages it lists are not those it uses")
    twice = stream(value, ONE).replace(list_of(text("0")), list_of(text("0"), text("0")))
    refused(twice, "it lists no storages")


def test_huge_declared_lengths(refused: Callable[..., str]) -> None:
    huge = 1 << 40
    honest = stream(dict_of({"w": tensor("0", huge, [1])}), {"0": (huge, b"\0" * 8)})
    refused(honest, "it says that 4,398,046,511,104 bytes follow, where 8 are left")
    for opcode, size in ((b"X", 4), (b"B", 4), (b"T", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8)):
        for length in ((1 << 8 * size - 1) - 1, (1 << 8 * size) - 1):
            refused(stream(opcode + length.to_bytes(size, "little")), "not a whole model file")
    refused(stream(b"r" + b"\xff" * 4), "its instructions do not fit")
    refused(stream(NONE + b"r" + b"\xff" * 4), "holds nothing")  # a memo of one entry
    refused(stream(b"\x95" + b"\xff" * 8 + EMPTY_LIST), "holds an empty list")  # a frame's length is not needed
    refused(stream(b"\x8a\xff" + b"\x7f" * 255), "an integer has more than 16 bytes")
    for place in range(3):
        parts = [b"hflow.network", b"source", b"{}"]
        lengths = [struct.pack("<I", 0xFFFFFFFF if i == place else len(part)) for i, part in enumerate(parts)]
        first, second, third = (length + part for length, part in zip(lengths, parts, strict=True))
        content = first + second + NETWORK + ADAM + third
        refused(content, "not a whole model file" if place else "is no model file", reader=read_published)


# work


def test_deep_nesting(refused: Callable[..., str]) -> None:
    depth = 100_000  # enough to end a recursion in C with a crash
    for value, reason in (
        (EMPTY_LIST * depth + b"a" * (depth - 1), "holds a list of 1 (a list); give"),
        (NONE + b"\x85" * depth, "holds a list of 1 (a list); give"),
        (MARK * depth, "not a whole model file"),
        (MARK * depth + b"t" * depth, "holds a list of 1 (a list); give"),
        ((EMPTY_DICT + text("a")) * depth + NONE + b"s" * depth, "holds a (a dictionary); give"),
    ):
        refused(stream(value), reason, measure=False)
    nested = NONE + b"\x85" * depth
    refused(stream(EMPTY_DICT + nested + NONE + b"s"), "a tuple as a key", measure=False)
    refused(stream(call(name("builtins", "set"), list_of(nested))), "a set is made of odd members", measure=False)
    refused(stream(b"\x8f" + MARK + nested + b"\x90"), "a tuple as a key", measure=False)


def test_a_bomb_of_references_costs_no_more_than_its_bytes(refused: Callable[..., str]) -> None:
    bomb = EMPTY_LIST + b"q\x000"
    for level in range(1, 100):
        previous = b"h" + bytes([level - 1])
        bomb += EMPTY_LIST + b"q" + bytes([level]) + MARK + previous * 10 + b"e0"
    refused(stream(bomb + b"hc"), "holds a list of 10 (a list)")
    refused(stream(OBJECT + dict_of({"a": bomb + b"hc"}) + BUILD), "holds a record of hflow.network.Step; give")
    itself = EMPTY_LIST + b"q\x00h\x00a"
    refused(stream(dict_of({"a": itself})), "holds a (a list of 1 (a list))")


def test_copies_are_counted(refused: Callable[..., str]) -> None:
    long = list_of(*[integer(i) for i in range(5000)]) + b"q\x000"
    copies = (name("builtins", "set") + b"q\x010" + long) + (b"h\x01h\x00\x85R0" * 10_000) + NONE
    refused(stream(copies), "a pickle takes more than 2,000,000 instructions")
    text_copies = name("_codecs", "encode") + b"q\x010" + text("x" * 100_000) + b"q\x000" + text("latin1") + b"q\x020"
    refused(stream(text_copies + b"h\x01h\x00h\x02\x86R" * 10_000 + NONE), "more than 2,000,000 instructions")


def test_a_pickle_without_end(refused: Callable[..., str]) -> None:
    refused(stream(NONE * 2_100_000), "a pickle takes more than 2,000,000 instructions", measure=False)
    refused(stream(text("x" * (33 << 20))), "bytes follow")


def module(parameters: bytes = b"", modules: bytes = b"") -> bytes:
    parts = {"_parameters": parameters or EMPTY_DICT, "_buffers": EMPTY_DICT, "_modules": modules or EMPTY_DICT}
    return OBJECT + dict_of(parts) + BUILD


def test_modules_that_contain_themselves(refused: Callable[..., str]) -> None:
    made = OBJECT + b"q\x00" + dict_of({"_parameters": EMPTY_DICT, "_buffers": EMPTY_DICT})[:-1]
    itself = made + text("_modules") + dict_of({"a": b"h\x00", "b": b"h\x00"}) + b"u" + BUILD
    refused(stream(itself), "its modules are nested deeper than 64")


def test_modules_that_double_at_every_level(refused: Callable[..., str]) -> None:
    value = module() + b"q\x00"
    for _ in range(60):
        value += b"0" + module(modules=dict_of({f"m{i}": b"h\x00" for i in range(4)})) + b"q\x00"
    refused(stream(value), "or have more than 100,000 entries")


def test_tensors_that_share_far_too_much(refused: Callable[..., str]) -> None:
    many = tensor("0", 1000, [1000]) + b"q\x000"
    value = many + dict_of({f"w{i}": b"h\x00" for i in range(10)})
    refused(stream(value, {"0": (1000, b"\0" * 4000)}), "far more than the 1,000 values it has")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (module(parameters=dict_of({"w": integer(1)})), "w is of a wrong kind"),
        (module(parameters=dict_of({"a.b": NONE})), "a.b is no name"),
        (module(parameters=dict_of({"a\n\x1b[2J": NONE})), "a\\n\\x1b[2J is no name"),
        (module(modules=dict_of({"m": integer(1)})), "m is of a wrong kind"),
        (module(modules=dict_of({"m": OBJECT})), "hflow.network.Step is no module"),
        (module(modules=dict_of({"m": module(parameters=list_of())})), "is no module"),
        (module(modules=dict_of({"m": b"N", "n": module(parameters=dict_of({"w": text("x")}))})), "n.w is of a wrong"),
        (dict_of({"w": integer(1)}), "holds w (a number); give a file that holds weights by name"),
        (EMPTY_DICT + integer(1) + NONE + b"s", "holds 1 (nothing); give"),
        (dict_of({"a" * 2000: NONE}), f"holds {'a' * 40}... (nothing); give"),
        (dict_of({"a" * 2000: tensor("0", 1, [1])}), "aaa... is no plain name of a tensor; refused"),
        (dict_of({"a\n\x1b[2J": tensor("0", 1, [1])}), ": a\\n\\x1b[2J is no plain name of a tensor; refused"),
        (dict_of({"": tensor("0", 1, [1])}), "is no plain name of a tensor; refused"),
        (dict_of({}), "holds an empty dictionary; give"),
        (integer(1), "holds a number; give a file that holds weights by name"),
        (text("x"), "holds text; give"),
        (tensor("0", 1, [1]), "holds a single tensor; give"),
        (list_of(tensor("0", 1, [1]), tensor("0", 1, [1])), "holds a list of 2 tensors; give"),
        (list_of(dict_of({"w": tensor("0", 1, [1])}), TRUE), "holds a list of 2 (1 tensor, a number); give"),
        (dict_of({"state": EMPTY_DICT, "param_groups": EMPTY_LIST}), "holds an optimizer's state; give"),
    ],
)
def test_what_is_no_network(refused: Callable[..., str], value: bytes, reason: str) -> None:
    """None of these files is cut or changed: another copy could not help."""
    message = refused(stream(value, ONE if b"FloatStorage" in value else {}), reason)
    assert "copy or download" not in message


# chance


NAMING = Naming("w", "w..., as here")
PIECES = [
    MARK, NONE, FALSE, EMPTY_TUPLE, EMPTY_DICT, EMPTY_LIST, REDUCE, BUILD, NEWOBJ, BINPERSID, STOP,
    b"t", b"e", b"u", b"a", b"s", b"0", b"1", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x93", b"\x94",
    b"q\x00", b"q\x01", b"h\x00", b"h\x01", text("w"), text("storage"), text("0"), text("cpu"), integer(1), integer(-1),
    STEP, GETATTR, FLOATS, OBJECT, storage("0", 1), tensor("0", 1, [1]), ordered_dict({"w": NONE}), module(),
]  # fmt: skip


@hypothesis_settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_random_instructions(pieces: list[bytes]) -> None:
    source = Source(io.BytesIO(b"\x80\x02" + b"".join(pieces) + STOP), "file")
    message = ""
    try:
        value = unpickle(source, torch_vocabulary(CLASSES), Storages().find)
        part_of(value, StoredTensor, "file", NAMING)
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()


def test_a_bug_of_ours_is_not_called_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: Any, name: str, argument: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hflow_rt.foreign.pickles._Machine.step", bug)
    with pytest.raises(ZeroDivisionError):
        unpickle(Source(io.BytesIO(b"\x80\x02N."), "file"))
