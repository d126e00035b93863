"""Builds model files byte by byte, honest and hostile ones: pickles, torch.save streams, the published container.

A value of a pickle is the bytes of the instructions that push it; they are joined like any bytes.
"""

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("hflow.network", "torch.nn.modules")
MAGIC = 0x1950A86A20F9469CFC6C
MARK, NONE, TRUE, FALSE = b"(", b"N", b"\x88", b"\x89"
EMPTY_TUPLE, EMPTY_DICT, EMPTY_LIST = b")", b"}", b"]"
REDUCE, BUILD, NEWOBJ, BINPERSID, STOP = b"R", b"b", b"\x81", b"Q", b"."


def program(value: bytes) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + value + STOP


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    return MARK + b"".join(values) + b"t"


def list_of(*values: bytes) -> bytes:
    return EMPTY_LIST + MARK + b"".join(values) + b"e"


def dict_of(pairs: Mapping[str, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + REDUCE


def ordered_dict(pairs: Mapping[str, bytes]) -> bytes:
    made = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    return made + MARK + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def storage(key: str, count: int, kind: str = "FloatStorage", place: str = "cpu") -> bytes:
    """The persistent id of a storage in a legacy stream."""
    return tuple_of(text("storage"), name("torch", kind), text(key), text(place), integer(count), NONE) + BINPERSID


def tensor(
    key: str, count: int, size: Sequence[int], stride: Sequence[int] | None = None, offset: int = 0, **options: str
) -> bytes:
    """A view of storage `key`, contiguous unless `stride` says otherwise."""
    if stride is None:
        stride = [int(np.prod(size[i + 1 :], dtype=np.int64)) for i in range(len(size))]
    sizes, strides = tuple_of(*map(integer, size)), tuple_of(*map(integer, stride))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(key, count, **options), integer(offset), sizes, strides, FALSE, ordered_dict({}))


def stream(value: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> bytes:
    """A legacy `torch.save` stream; `storages` are counts and bytes by key."""
    storages = storages or {}
    system = dict_of({"protocol_version": integer(1001), "little_endian": TRUE, "type_sizes": EMPTY_DICT})
    head = program(integer(MAGIC)) + program(integer(1001)) + program(system) + program(value)
    keys = program(list_of(*map(text, storages)))
    return head + keys + b"".join(struct.pack("<Q", count) + data for count, data in storages.values())


def sized(data: bytes) -> bytes:
    """u32 length, then the data."""
    return struct.pack("<I", len(data)) + data


def container(module: bytes, adam: bytes, settings: bytes | None, source: bytes = b"raise SystemExit\n") -> bytes:
    """The published container of two streams; the source text would end whoever executes it."""
    return sized(b"hflow.network") + sized(source) + module + adam + (b"" if settings is None else sized(settings))


NETWORK = stream(dict_of({"w": tensor("0", 1, [1])}), {"0": (1, b"\0" * 4)})
ADAM = stream(dict_of({"state": EMPTY_DICT, "param_groups": EMPTY_LIST}))


def zipped(value: bytes, records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """torch's zip format."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("model/data.pkl", program(value))
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/version", "3\n")
        for key, data in records.items():
            archive.writestr(f"model/data/{key}", data)
    return buffer.getvalue()


class _Network:
    """Writes a tree of modules as the published implementation's own pickles have it.

    Every class is named once, by an id with its file and source text; modules hold bound methods of their parents,
    numpy numbers of both module names, sets and empty slots; masks and blur kernels are among the tensors.
    """

    def __init__(self, place: str) -> None:
        self.place, self.known, self.memo = place, dict[str, int](), 0
        self.storages: dict[str, tuple[int, bytes]] = {}

    def remember(self) -> bytes:
        self.memo += 1
        return b"r" + struct.pack("<I", self.memo)

    def cls(self, attribute: str) -> bytes:
        if attribute in self.known:
            return b"j" + struct.pack("<I", self.known[attribute])
        parts = text("module"), name("hflow.network", attribute), text("/home/x/network.py"), text("raise SystemExit")
        made = tuple_of(*parts) + BINPERSID + self.remember()
        self.known[attribute] = self.memo
        return made

    def parameter(self, value: NDArray[Any]) -> bytes:
        key = str(94_000_000_000_000 + len(self.storages))
        self.storages[key] = (value.size, np.ascontiguousarray(value, "<f4").tobytes())
        return tensor(key, value.size, value.shape, place=self.place)

    def number(self, core: str) -> bytes:
        dtype = call(name("numpy", "dtype"), text("f8"), FALSE, TRUE)
        state = tuple_of(integer(3), text("<"), NONE, NONE, NONE, integer(-1), integer(-1), integer(0))
        data = call(name("_codecs", "encode"), text("\x9a\x99\x99\x99\x99\x99\xb9?"), text("latin1"))
        return call(name(f"numpy.{core}.multiarray", "scalar"), dtype + state + BUILD, data)

    def module(self, tree: Mapping[str, Any], parent: int | None) -> bytes:
        made = self.cls("Step" if parent else "MultiStep") + EMPTY_TUPLE + NEWOBJ + self.remember()
        own = self.memo
        parameters: dict[str, bytes] = {"nothing": NONE}
        buffers: dict[str, bytes] = {}
        modules: dict[str, bytes] = {}
        for part, value in tree.items():
            if isinstance(value, dict):
                modules[part] = self.module(value, own)
            elif part.startswith("interp_K"):
                buffers[part] = self.parameter(value)
            else:
                rebuild = name("torch._utils", "_rebuild_parameter")
                parameters[part] = call(rebuild, self.parameter(value), TRUE, ordered_dict({}))
        if parent is None:
            buffers["passing"] = self.parameter(np.zeros(3))
        state = {
            "training": FALSE,
            "_parameters": ordered_dict(parameters),
            "_buffers": ordered_dict(buffers),
            "_non_persistent_buffers_set": call(name("__builtin__", "set"), list_of(text("passing"))),
            "_modules": ordered_dict(modules),
            "gain": self.number("_core" if own % 2 else "core"),
            "layers": list_of(integer(1), integer(2)),
        }
        if parent is not None:
            above = b"j" + struct.pack("<I", parent)
            state["ask_parent"] = call(name("__builtin__", "getattr"), above, text("draw"))
        return made + dict_of(state) + BUILD


def published(state: Mapping[str, NDArray[Any]], settings: Mapping[str, Any] | None, place: str = "cuda:0") -> bytes:
    """A container as the published implementation writes them, of float32 weights under its own names."""
    tree: dict[str, Any] = {}
    for dotted, value in state.items():
        *path, leaf = dotted.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    network = _Network(place)
    module = stream(network.module(tree, None), network.storages)
    text_of_settings = None if settings is None else json.dumps(settings).encode()
    return container(module, ADAM, text_of_settings, source=b"raise SystemExit('executed')\n")


def small() -> bytes:
    """A whole container in which nothing is wrong but the settings."""
    state = {"blocks.0.weird.w": np.arange(6.0).reshape(2, 3), "interp_K": np.ones((1, 1, 4, 4))}
    return published(state, {"MODEL_PARAMETERS": {}})
