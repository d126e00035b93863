"""What the pickles of torch name: storages, tensors that are views of them, and the small things around them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from hflow_rt.foreign.pickles import Described, Function, Inert, Refused, StandIn, Vocabulary
from hflow_rt.foreign.source import Source, shown

__all__ = ["Storage", "Storages", "StoredTensor", "torch_vocabulary"]

_DIMENSIONS = 16
_LARGEST = 1 << 40
_SCALARS = re.compile(r"[<|=]?([fiu][1248]|b1)")
_LOCATION = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, eq=False)
class _StorageType:
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class Storage:
    """`count` values of a kind; `data` is there once it was read."""

    dtype: torch.dtype
    count: int
    data: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.count * self.dtype.itemsize

    def load(self, source: Source) -> None:
        """Read the values, which come next. Raises `CheckpointError`."""
        raw = torch.from_numpy(source.array(self.bytes))
        if self.dtype is torch.bool:  # may only be 0 or 1, a byte of the file anything
            self.data = raw != 0
        else:  # torch views no empty bytes as something larger
            self.data = raw.view(self.dtype) if self.count else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A strided view that was found to lie inside its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """The view itself; nothing is copied."""
        assert self.storage.data is not None
        return torch.as_strided(self.storage.data, self.size, self.stride, self.offset)


class Storages:
    """The storages that a pickle names by persistent ids, by key, in the order of their names."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def find(self, persistent_id: object) -> object:
        """A storage, or the class that the legacy format wraps into an id with its source text (which is ignored)."""
        match persistent_id:
            case ("module", StandIn() as cls, str(), str()):
                return cls
            case ("storage", _StorageType(dtype), str(key), str(place), int(count), None) | (
                "storage",
                _StorageType(dtype),
                str(key),
                str(place),
                int(count),
            ):
                if not _LOCATION.fullmatch(place):
                    raise Refused(f"a storage on {shown(place)}")
                if count < 0:
                    raise ValueError("a storage has a negative size")
                storage = self.by_key.setdefault(key, Storage(dtype, count))
                if storage.dtype is not dtype or storage.count != count:
                    raise ValueError(f"storage {shown(key)} is declared twice, differently")
                return storage
        raise Refused("a persistent id that names no storage")


def torch_vocabulary(modules: Sequence[str] = ()) -> Vocabulary:
    """The names in a file of tensors, and those of classes of `modules` as inert stand-ins."""
    return Vocabulary(_KNOWN, tuple(modules))


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict is made of arguments")
    return {}


def _counter(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case () | ({},):
            return dict(*arguments)
    raise ValueError("a Counter is made of odd arguments")


def _device(arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str(kind),) | (str(kind), int()):
            return kind
    raise ValueError("a device is made of odd arguments")


def _set(arguments: tuple[Any, ...]) -> set[str | int]:
    match arguments:
        case ([*members],) if all(type(member) in (str, int) for member in members):
            return set(members)
    raise ValueError("a set is made of odd members")


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    match arguments:
        case (tuple() as sizes,):
            return _integers(sizes)
    raise ValueError("a size is made of odd arguments")


class _Method(Described):
    """A bound method of a module, of which nothing is needed."""

    __slots__ = ()


_METHOD = _Method()


def _getattr(arguments: tuple[Any, ...]) -> object:
    match arguments:
        case (Inert(), str(name)) if name.isidentifier() and not name.startswith("__"):
            return _METHOD
        case (_, str(name)):
            raise Refused(f"getattr of {shown(name)}")
    raise Refused("getattr")


def _encode(arguments: tuple[Any, ...]) -> bytes:
    match arguments:
        case (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise Refused("_codecs.encode to something else than latin1")


class _NumpyDtype(Described):
    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code


def _dtype(arguments: tuple[Any, ...]) -> _NumpyDtype:
    match arguments:
        case (str(code), *_) if _SCALARS.fullmatch(code):
            return _NumpyDtype(code)
    raise Refused("a numpy dtype that is no plain number")


def _scalar(arguments: tuple[Any, ...]) -> object:
    match arguments:
        case (_NumpyDtype() as kind, bytes(data)):
            dtype = np.dtype(kind.code)
            if len(data) == dtype.itemsize:
                return np.frombuffer(data, dtype)[0].item()
    raise ValueError("a numpy number is made of odd arguments")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple() as size, tuple() as stride, bool(), *_):
            sizes, strides = _integers(size), _integers(stride)
            if len(sizes) != len(strides) or min((offset, *sizes, *strides)) < 0:
                raise ValueError("a tensor has odd sizes or strides")
            if max(offset, *strides, 0) > _LARGEST or prod(n for n in sizes if n) > _LARGEST:
                raise ValueError("a tensor has huge sizes or strides")
            values = prod(sizes)
            last = (
                offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if values else offset - 1
            )
            if last >= storage.count or values > storage.count:
                raise ValueError(f"a tensor of {values:,} values reaches out of its storage of {storage.count:,}")
            return StoredTensor(storage, offset, sizes, strides)
    raise ValueError("a tensor is made of odd arguments")


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), *_):
            return tensor
    raise ValueError("a parameter is made of odd arguments")


def _integers(values: tuple[Any, ...]) -> tuple[int, ...]:
    if len(values) > _DIMENSIONS or not all(type(value) is int for value in values):
        raise ValueError("a size is no short tuple of integers")
    return values


_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_KNOWN: dict[str, object] = {
    "collections.OrderedDict": Function(_ordered_dict),
    # what training scripts keep beside weights: their options, and schedules of learning rates
    "argparse.Namespace": StandIn("argparse.Namespace"),
    "collections.Counter": Function(_counter),
    "torch.device": Function(_device),
    "_codecs.encode": Function(_encode),
    "numpy.dtype": Function(_dtype),
    "torch.Size": Function(_size),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_parameter": Function(_parameter),
    # the standard library's module of built-in names, as python 3 and protocol 2 call it
    **{f"{module}.set": Function(_set) for module in ("builtins", "__builtin__")},
    **{f"{module}.getattr": Function(_getattr) for module in ("builtins", "__builtin__")},
    # numpy 2 and older
    **{f"numpy.{core}.multiarray.scalar": Function(_scalar) for core in ("_core", "core")},
    **{f"torch.{name}Storage": _StorageType(dtype) for name, dtype in _STORAGES.items()},
}
