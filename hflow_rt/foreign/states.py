"""Weights by name, out of every kind of file: torch's legacy and zip formats, whole modules, safetensors."""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.modules import MOST_ENTRIES
from hflow_rt.foreign.parts import Naming, Part, part_of
from hflow_rt.foreign.pickles import Function, Vocabulary, unpickle
from hflow_rt.foreign.source import Source, open_source, shown
from hflow_rt.foreign.tensors import Storage, Storages, StoredTensor, torch_vocabulary

__all__ = ["Choose", "read_part", "read_pickle", "read_stream", "read_weights", "skip_stream"]

T = TypeVar("T")

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_SHARED = 8  # how often the same values may stand under several names
# the kinds that torch's own files hold; of others, torch cannot read each
_SAFETENSORS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class Choose(Protocol):
    """Which tensors of a file are taken: of what it holds, where an instance of `kind` stands for a tensor."""

    def __call__(self, value: Any, kind: type[T]) -> Part[T]:
        """The tensors, by name. Raises `CheckpointError`."""


def read_weights(
    path: Path, modules: Sequence[str] = (), naming: Naming | None = None, part: str | None = None
) -> Part[Tensor]:
    """The weights in a file, see `part_of` and `read_part`. Raises `CheckpointError`."""
    return read_part(path, lambda value, kind: part_of(value, kind, str(path), naming, part), modules)


def read_part(path: Path, choose: Choose, modules: Sequence[str] = ()) -> Part[Tensor]:
    """The chosen tensors of a `.safetensors`, a `.pt`/`.pth` of either format, or a pickled module of `modules`.

    The first bytes say what the file is. No other tensors are read. Raises `CheckpointError`.
    """
    with open_source(path) as source:
        start = source.peek(9)
        if start.startswith(b"PK"):
            return _read_zip(path, source, modules, choose)
        if start.startswith(b"\x80"):
            return _read_stream(source, modules, choose)
    if start[8:] == b"{":
        return _read_safetensors(path, choose)
    raise CheckpointError(
        f"{path} is no model file: it must be .safetensors or made by torch.save, and begins with {start[:4].hex(' ')}"
    )


def read_stream(
    source: Source, modules: Sequence[str] = (), naming: Naming | None = None, part: str | None = None
) -> Part[Tensor]:
    """The weights in a legacy `torch.save` stream, which is a few pickles and then storages.

    Raises `CheckpointError`.
    """
    return _read_stream(source, modules, lambda value, kind: part_of(value, kind, source.name, naming, part))


def _read_stream(source: Source, modules: Sequence[str], choose: Choose) -> Part[Tensor]:
    value, storages = _begin_stream(source, modules)
    found = choose(value, StoredTensor)
    _pass_storages(source, storages, found.weights.values())
    return _loaded(found, source)


def skip_stream(source: Source, modules: Sequence[str] = ()) -> Any:
    """The value in a legacy stream; its tensors have no values. Raises `CheckpointError`."""
    value, storages = _begin_stream(source, modules)
    _pass_storages(source, storages, ())
    return value


def read_pickle(path: Path, known: Mapping[str, object], modules: Sequence[str], choose: Choose) -> Part[Tensor]:
    """The chosen tensors of one plain pickle, in which every storage is the bytes of a stream of its own.

    known: further names, see `Vocabulary`. No other storages are copied. Raises `CheckpointError`.
    """
    with open_source(path) as source:
        if source.peek(1) != b"\x80":
            raise CheckpointError(f"{path} is no pickle; give the file as it was published")
        storages = _PickledStorages(str(path))
        names = {**torch_vocabulary().known, "torch.storage._load_from_bytes": Function(storages.find, False), **known}
        value = unpickle(source, Vocabulary(names, tuple(modules)), limit=source.left)
        if source.left:
            raise source.broken("something follows its end")
        found = choose(value, StoredTensor)
        storages.load(found.weights.values())
        return _loaded(found, source)


class _PickledStorages:
    """Storages as bytes in a pickle: what they are is read as they are met, their values when they are wanted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._streams: dict[Storage, tuple[Source, dict[str, Storage]]] = {}
        self._known: dict[int, tuple[bytes, Storage]] = {}  # so that the same bytes are read once, however often asked

    def find(self, arguments: tuple[Any, ...]) -> Storage:
        match arguments:
            case (bytes(data),) if id(data) in self._known:
                return self._known[id(data)][1]
            case (bytes(data),):
                source = Source(io.BytesIO(data), self._name)
                storage, storages = _begin_stream(source, ())
                if not isinstance(storage, Storage) or list(storages.values()) != [storage]:
                    raise ValueError("a storage is no storage")
                self._streams[storage] = source, storages
                self._known[id(data)] = data, storage
                return storage
        raise ValueError("a storage is made of odd arguments")

    def load(self, tensors: Iterable[StoredTensor]) -> None:
        tensors = list(tensors)
        for storage in dict.fromkeys(tensor.storage for tensor in tensors):
            source, storages = self._streams[storage]
            _pass_storages(source, storages, tensors)
            if source.left:
                raise source.broken("something follows a storage")


def _begin_stream(source: Source, modules: Sequence[str]) -> tuple[Any, dict[str, Storage]]:
    """The value of a stream, and the storages that follow, in their order."""
    magic, protocol, system = unpickle(source), None, None
    if type(magic) is int and magic == _MAGIC:
        protocol, system = unpickle(source), unpickle(source)
    if type(protocol) is not int or protocol != _PROTOCOL or not isinstance(system, dict):
        raise CheckpointError(f"{source.name} is a pickle, but not of torch.save; save its weights with torch.save")
    _check_byte_order(system.get("little_endian") is True, source)
    storages = Storages()
    value = unpickle(source, torch_vocabulary(modules), storages.find)
    keys = unpickle(source)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise source.broken("it lists no storages")
    if set(keys) != storages.by_key.keys():
        raise source.broken("the storages it lists are not those it uses")
    return value, {key: storages.by_key[key] for key in keys}


def _pass_storages(source: Source, storages: Mapping[str, Storage], tensors: Iterable[StoredTensor]) -> None:
    """Read the storages of `tensors`, and skip the others."""
    wanted = {id(tensor.storage) for tensor in tensors}
    for key, storage in storages.items():
        if source.length(8) != storage.count:
            raise source.broken(f"storage {shown(key)} has another size than declared")
        if id(storage) in wanted:
            storage.load(source)
        else:
            source.skip(storage.bytes)


def _check_byte_order(is_little: bool, source: Source) -> None:
    if not is_little:
        raise CheckpointError(f"{source.name} holds big-endian numbers; save it on a little-endian machine")


def _loaded(part: Part[StoredTensor], source: Source) -> Part[Tensor]:
    """The same weights, whose storages have been read, as tensors."""
    views = {name: tensor.tensor() for name, tensor in part.weights.items()}
    stored = sum({id(tensor.storage): tensor.storage.count for tensor in part.weights.values()}.values())
    if sum(view.numel() for view in views.values()) > _SHARED * stored:
        raise CheckpointError(f"{source.name}: its tensors hold far more than the {stored:,} values it has; refused")
    return Part(views, part.name, part.prefix, part.passed_over)


def _read_zip(path: Path, source: Source, modules: Sequence[str], choose: Choose) -> Part[Tensor]:
    """torch's newer format: `NAME/data.pkl` and `NAME/data/KEY`, stored without compression."""
    with open(path, "rb") as file:
        if _count(file, b"PK\x01\x02") > MOST_ENTRIES:
            raise CheckpointError(f"{path}: its zip must have at most {MOST_ENTRIES:,} entries; refused")
        with _zip_errors(source):
            archive = zipfile.ZipFile(file)
        with archive:
            return _read_archive(archive, source, torch_vocabulary(modules), choose)


@contextmanager
def _zip_errors(source: Source) -> Iterator[None]:
    """All that `zipfile` raises on odd bytes, as one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise source.broken(shown(str(error)) or "its zip cannot be read") from error


def _read_archive(archive: zipfile.ZipFile, source: Source, vocabulary: Vocabulary, choose: Choose) -> Part[Tensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise CheckpointError(f"{source.name} is a zip, but not of torch.save; give the model file itself")
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{source.name}: its zip holds compressed entries, which torch.save never writes; save it again"
            )
    if sum(entry.file_size for entry in entries.values()) > source.left:
        raise source.broken("its zip declares more than the file holds")
    root = programs[0].removesuffix("data.pkl")

    def member(name: str) -> Source:
        if name not in entries:
            raise source.broken(f"its zip lacks {shown(name)}")
        with _zip_errors(source):
            return Source(io.BytesIO(archive.read(entries[name])), source.name)

    if root + "byteorder" in entries:
        _check_byte_order(member(root + "byteorder").peek(10) == b"little", source)
    storages = Storages()
    value = unpickle(member(programs[0]), vocabulary, storages.find)
    found = choose(value, StoredTensor)
    wanted = {id(tensor.storage) for tensor in found.weights.values()}
    for key, storage in storages.by_key.items():
        if id(storage) in wanted:
            data = member(f"{root}data/{key}")
            if data.left != storage.bytes:
                raise source.broken(f"storage {shown(key)} has another size than declared")
            storage.load(data)
    return _loaded(found, source)


def _count(file: BinaryIO, mark: bytes) -> int:
    """How often `mark` stands in a file, without holding it; one that crosses a chunk is not worth counting."""
    total = 0
    while chunk := file.read(1 << 22):
        total += chunk.count(mark)
    file.seek(0)
    return total


def _read_safetensors(path: Path, choose: Choose) -> Part[Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            found = choose(dict(zip(names, names, strict=True)), str)
            for name in found.weights.values():
                if (kind := file.get_slice(name).get_dtype()) not in _SAFETENSORS:
                    raise CheckpointError(
                        f"{path}: {shown(name)} is of kind {shown(str(kind))}, which is none of "
                        f"{', '.join(_SAFETENSORS)}; convert it to one of these"
                    )
            tensors = {own: file.get_tensor(name) for own, name in found.weights.items()}
            return Part(tensors, found.name, found.prefix, found.passed_over)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({shown(str(error))}); copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
