"""Weights by name, out of every kind of file: torch's legacy and zip formats, whole modules, safetensors."""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.pickles import Inert, Vocabulary, unpickle
from hflow_rt.foreign.source import Source, open_source, shown
from hflow_rt.foreign.tensors import Storages, StoredTensor, torch_vocabulary

__all__ = ["read_state", "read_stream", "state_of"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ENTRIES = 100_000  # of a zip's directory or of all modules; a large network has a few thousand
_TENSORS = 20_000  # a network of the published sizes has about 1,700
_DEPTH = 64
_SHARED = 8  # how often the same values may stand under several names
# the kinds that torch's own files hold; of others, torch cannot read each
_SAFETENSORS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_PART = re.compile(r"\w{1,100}", re.ASCII)
_NAME = re.compile(r"[\w.\-]{1,1000}", re.ASCII)


def read_state(path: Path, modules: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, a `.pt`/`.pth` of either format, or a pickled module of `modules`.

    What the file is is told from its first bytes. Raises `CheckpointError`.
    """
    with open_source(path) as source:
        start = source.peek(9)
        if start.startswith(b"PK"):
            return _read_zip(path, source, modules)
        if start.startswith(b"\x80"):
            return state_of(read_stream(source, modules), source)
    if start[8:] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(
        f"{path} is no model file: it must be .safetensors or made by torch.save, and begins with {start[:4].hex(' ')}"
    )


def read_stream(source: Source, modules: Sequence[str] = (), load: bool = True) -> Any:
    """The value in a legacy `torch.save` stream, which is a few pickles and then storages.

    load: else the storages are skipped and tensors have no values. Raises `CheckpointError`.
    """
    magic, protocol, system = unpickle(source), unpickle(source), unpickle(source)
    if type(magic) is not int or magic != _MAGIC or type(protocol) is not int or protocol != _PROTOCOL:
        raise source.broken("a torch.save stream must begin here")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise source.broken("numbers must be little-endian")
    storages = Storages()
    value = unpickle(source, torch_vocabulary(modules), storages.find)
    keys = unpickle(source)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise source.broken("it lists no storages")
    if set(keys) != storages.by_key.keys():
        raise source.broken("the storages it lists are not those it uses")
    for key in keys:
        storage = storages.by_key[key]
        if source.length(8) != storage.count:
            raise source.broken(f"storage {shown(key)} has another size than declared")
        if load:
            storage.load(source)
        else:
            source.skip(storage.bytes)
    return value


def state_of(value: object, source: Source) -> dict[str, Tensor]:
    """The tensors of a state dict, of one under "state_dict" as training frameworks save it, or of an inert module.

    By dotted name. Raises `CheckpointError`.
    """
    if isinstance(value, Inert):
        found = dict(_module_tensors(value, source))
    elif isinstance(value, dict):
        inner = value.get("state_dict")
        found = inner if isinstance(inner, dict) else value
    else:
        raise source.broken("it holds neither a network nor its weights")
    if len(found) > _TENSORS:
        raise source.broken(f"it holds more than {_TENSORS:,} tensors")
    for name, tensor in found.items():
        if type(name) is not str or not _NAME.fullmatch(name):
            raise source.broken(f"{shown(str(name))} is no name of a tensor")
        if not isinstance(tensor, StoredTensor):
            raise source.broken(f"{shown(name)} is a {type(tensor).__name__} instead of a tensor")
    views = {name: tensor.tensor() for name, tensor in found.items()}
    stored = sum({id(tensor.storage): tensor.storage.count for tensor in found.values()}.values())
    if sum(view.numel() for view in views.values()) > _SHARED * stored:
        raise source.broken(f"its tensors hold far more than the {stored:,} values it has")
    return views


def _module_tensors(root: Inert, source: Source) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and kept buffers of a module and all below it, as torch's `state_dict` names them."""
    open_modules = [("", root, 0)]
    seen = 0
    while open_modules:
        prefix, module, depth = open_modules.pop()
        state = module.state or {}
        parts: dict[str, dict[Any, Any]] = {}
        for key in ("_parameters", "_buffers", "_modules"):
            part = state.get(key)
            if not isinstance(part, dict):
                raise source.broken(f"{shown(module.name)} is no module")
            parts[key] = part
        seen += 1 + sum(map(len, parts.values()))
        if depth > _DEPTH or seen > _ENTRIES:
            raise source.broken(f"its modules are nested deeper than {_DEPTH}, or have more than {_ENTRIES:,} entries")
        hidden = state.get("_non_persistent_buffers_set")
        for key, part in parts.items():
            for name, value in part.items():
                if type(name) is not str or not _PART.fullmatch(name):
                    raise source.broken(f"{shown(str(name))} is no name of a tensor or module")
                if value is None or (key == "_buffers" and isinstance(hidden, set) and name in hidden):
                    continue
                if key == "_modules" and isinstance(value, Inert):
                    open_modules.append((f"{prefix}{name}.", value, depth + 1))
                elif key != "_modules" and isinstance(value, StoredTensor):
                    yield prefix + name, value
                else:
                    raise source.broken(f"{shown(prefix + name)} is of a wrong kind")


def _read_zip(path: Path, source: Source, modules: Sequence[str]) -> dict[str, Tensor]:
    """torch's newer format: `NAME/data.pkl` and `NAME/data/KEY`, stored without compression."""
    with open(path, "rb") as file:
        if _count(file, b"PK\x01\x02") > _ENTRIES:
            raise source.broken(f"its zip has more than {_ENTRIES:,} entries")
        with _zip_errors(source):
            archive = zipfile.ZipFile(file)
        with archive:
            return _read_archive(archive, source, torch_vocabulary(modules))


@contextmanager
def _zip_errors(source: Source) -> Iterator[None]:
    """All that `zipfile` raises on odd bytes, as one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise source.broken(shown(str(error)) or "its zip cannot be read") from error


def _read_archive(archive: zipfile.ZipFile, source: Source, vocabulary: Vocabulary) -> dict[str, Tensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise source.broken("its zip holds compressed entries, which torch.save never writes")
    if sum(entry.file_size for entry in entries.values()) > source.left:
        raise source.broken("its zip declares more than the file holds")
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise source.broken("it is a zip, but not of torch.save")
    root = programs[0].removesuffix("data.pkl")

    def member(name: str) -> Source:
        if name not in entries:
            raise source.broken(f"its zip lacks {shown(name)}")
        with _zip_errors(source):
            return Source(io.BytesIO(archive.read(entries[name])), source.name)

    if root + "byteorder" in entries and member(root + "byteorder").peek(10) != b"little":
        raise source.broken("numbers must be little-endian")
    storages = Storages()
    value = unpickle(member(programs[0]), vocabulary, storages.find)
    for key, storage in storages.by_key.items():
        data = member(f"{root}data/{key}")
        if data.left != storage.bytes:
            raise source.broken(f"storage {shown(key)} has another size than declared")
        storage.load(data)
    return state_of(value, source)


def _count(file: BinaryIO, mark: bytes) -> int:
    """How often `mark` stands in a file, without holding it; one that crosses a chunk is not worth counting."""
    total = 0
    while chunk := file.read(1 << 22):
        total += chunk.count(mark)
    file.seek(0)
    return total


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if len(names) > _TENSORS or not all(_NAME.fullmatch(name) for name in names):
                raise CheckpointError(f"{path} must hold at most {_TENSORS:,} tensors with plain names")
            for name in names:
                if (kind := file.get_slice(name).get_dtype()) not in _SAFETENSORS:
                    raise CheckpointError(
                        f"{path}: {shown(name)} is of kind {shown(str(kind))}, which is none of "
                        f"{', '.join(_SAFETENSORS)}; convert it to one of these"
                    )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({shown(str(error))}); copy or download it again"
        ) from error
