"""Which tensors of a file are the weights: in which of its entries they lie, and what stands before their names.

Training scripts save weights below a key of their choice, beside an optimizer's state, counters and settings, often
twice: as trained, and averaged. What is taken is said, and so is what is passed over; where there is a choice, the
user makes it. All work is bounded by the size of the file: every dictionary is looked into once.
"""

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from operator import getitem
from typing import Any, Generic, TypeVar

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.modules import MOST_ENTRIES, is_module, module_tensors
from hflow_rt.foreign.pickles import Inert
from hflow_rt.foreign.source import shown

__all__ = ["WHOLE", "Naming", "Part", "part_of"]

WHOLE = "."  # the part that is the file itself, or those of its names that have no prefix
_TENSORS = 20_000  # a network of the published sizes has about 1,700
_NESTED = 8  # dictionaries in dictionaries that are looked into
_KEY, _LINE = 40, 240  # characters that are shown of a key, and of several names
_LISTED = 16  # of what is passed over
_SAMPLED = 100  # items of a list that are looked at
_NAME = re.compile(r"[\w.\-]{1,1000}", re.ASCII)
_PLAIN = {bool: "a number", int: "a number", float: "a number", str: "text", bytes: "bytes", type(None): "nothing"}

T = TypeVar("T")


@dataclass(frozen=True)
class Naming:
    """How the tensors of a family's networks are told from others: by how some of their names begin.

    begins: a regular expression of these beginnings. words: what a message says of them.
    """

    begins: str
    words: str

    def prefixes(self, names: Mapping[Any, object]) -> dict[str, None]:
        """What stands before the names of each network among these, such as `module.`, or nothing, in their order."""
        pattern = re.compile(rf"((?:[\w\-]+\.)*?)(?:{self.begins})", re.ASCII)
        found = (pattern.match(name) for name in names if type(name) is str)
        return dict.fromkeys(match[1] for match in found if match)


@dataclass(frozen=True)
class Part(Generic[T]):
    """Weights by the network's own names.

    name: the entry they lie in, as `--part` calls it. prefix: what stood before their names. passed_over: what else
    the file holds, by name, and of which kind that is.
    """

    weights: dict[str, T]
    name: str = WHOLE
    prefix: str = ""
    passed_over: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry(Generic[T]):
    """A dictionary with tensors in it, or a pickled network, below these keys."""

    keys: tuple[Any, ...]
    tensors: Mapping[Any, T]


@dataclass(frozen=True)
class _Network(Generic[T]):
    """The tensors of an entry behind a prefix, which is one of `prefixes`."""

    entry: _Entry[T]
    prefix: str
    prefixes: AbstractSet[str]

    @property
    def full_name(self) -> str:
        """Keys and prefix."""
        return _joined(*self.entry.keys, *self.prefix.split(".")[:-1])

    @property
    def name(self) -> str:
        """The same, without a prefix that tells nothing apart."""
        return self.full_name if len(self.prefixes) > 1 else _joined(*self.entry.keys)

    def owner(self, name: object) -> str | None:
        """The longest of the prefixes that a tensor's name begins with."""
        if type(name) is not str:
            return None
        dots = [index for index, letter in enumerate(name) if letter == "."]
        heads = (name[: index + 1] for index in reversed(dots))
        return next((head for head in heads if head in self.prefixes), "" if "" in self.prefixes else None)


def part_of(value: object, kind: type[T], file: str, naming: Naming | None = None, part: str | None = None) -> Part[T]:
    """The weights in `value`, which is what a file holds; an instance of `kind` stands for a tensor.

    naming: tells them from other tensors; without it every dictionary of tensors may be weights. part: the entry to
    take, which is needed where several fit. Raises `CheckpointError`, which begins with `file`.
    """
    entries = _entries(value, kind, file)
    if not entries:
        found = shown(_contents(value, kind), _LINE)
        raise CheckpointError(f"{file} holds {found}; give a file that holds weights by name")
    networks = [
        _Network(entry, prefix, prefixes.keys())
        for entry in entries
        for prefixes in [naming.prefixes(entry.tensors) if naming else {"": None}]
        for prefix in prefixes
    ]
    if not networks:
        assert naming is not None
        first = _joined(*entries[0].keys, next(iter(entries[0].tensors), "nothing"))
        raise CheckpointError(f"{file} must name its tensors {naming.words}; found {first}")
    chosen = [network for network in networks if part in (None, network.name, network.full_name)]
    if len(chosen) != 1:
        names = shown(", ".join(network.name for network in networks[:_LISTED]), _LINE)
        if not chosen:
            raise CheckpointError(f"{file} has no weights called {shown(part or '')}; --part must be one of {names}")
        if part is not None:
            raise CheckpointError(f"{file} has {len(chosen)} entries called {shown(part)}; save one of them alone")
        raise CheckpointError(f"{file} holds {len(networks):,} networks ({names}); choose one with --part NAME")
    network = chosen[0]
    return Part(_own(network, file), network.name, network.prefix, _passed_over(value, kind, network, entries))


def _entries(value: object, kind: type[T], file: str) -> list[_Entry[T]]:
    """Every dictionary of tensors and every pickled network, from the outside in; what stands there twice, once."""
    found: list[_Entry[T]] = []
    waiting: deque[tuple[tuple[Any, ...], Any]] = deque([((), value)] if _is_looked_into(value) else [])
    seen, left = {id(value)}, [MOST_ENTRIES]
    while waiting:
        keys, inner = waiting.popleft()
        if isinstance(inner, Inert):
            found.append(_Entry(keys, dict(module_tensors(inner, kind, file, left))))
            continue
        if tensors := {name: tensor for name, tensor in inner.items() if isinstance(tensor, kind)}:
            found.append(_Entry(keys, tensors))
        for key, below in inner.items():
            if _is_looked_into(below) and id(below) not in seen and len(keys) < _NESTED:
                seen.add(id(below))
                waiting.append(((*keys, key), below))
        if len(seen) > MOST_ENTRIES:
            raise CheckpointError(f"{file} must hold at most {MOST_ENTRIES:,} dictionaries; refused")
    return found


def _is_looked_into(value: object) -> bool:
    return is_module(value) or (isinstance(value, dict) and not _is_optimizer(value))


def _is_optimizer(value: object) -> bool:
    """Whether this is what torch's optimizers save: moments of the weights, which are tensors, but no weights."""
    return isinstance(value, dict) and "state" in value and "param_groups" in value


def _own(network: _Network[T], file: str) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, tensor in network.entry.tensors.items():
        if network.owner(name) == network.prefix:
            own = name.removeprefix(network.prefix)
            if not _NAME.fullmatch(own):
                raise CheckpointError(f"{file}: {shown(name)} is no plain name of a tensor; refused")
            found[own] = tensor
    if len(found) > _TENSORS:
        raise CheckpointError(f"{file} must hold at most {_TENSORS:,} tensors, not {len(found):,}; refused")
    return found


def _passed_over(value: Any, kind: type[T], network: _Network[T], entries: list[_Entry[T]]) -> dict[str, str]:
    """What stands beside the network and on the way to it: the first ones by name, the rest as a number."""
    keys = network.entry.keys
    beside = _beside(value, keys, kind)
    taken = reduce(getitem, keys, value)
    found = {
        _joined(*path): "the same" if other is taken else _kind(other, kind, _count_below(path, entries))
        for path, other in islice(beside, _LISTED)
    }
    strange: Counter[str] = Counter()
    for name in network.entry.tensors:
        owner = network.owner(name)
        if owner != network.prefix:
            head = owner.split(".")[:-1] if owner else [str(name).partition(".")[0]]
            strange[WHOLE if owner == "" else _joined(*keys, *head)] += 1
    more = sum(1 for _ in beside) + len(strange)
    for name, count in islice(strange.items(), _LISTED):
        found[name] = _tensors(count)
        more -= 1
    return found | ({"...": f"{more:,} more"} if more else {})


def _beside(value: Any, keys: tuple[Any, ...], kind: type[T]) -> Iterator[tuple[tuple[Any, ...], object]]:
    """Whatever is no tensor of the entry below `keys`, with the keys to it."""
    for depth, key in enumerate(keys):
        yield from (((*keys[:depth], name), other) for name, other in value.items() if name != key)
        value = value[key]
    if isinstance(value, dict):
        yield from (((*keys, name), other) for name, other in value.items() if not isinstance(other, kind))


def _count_below(path: tuple[Any, ...], entries: list[_Entry[T]]) -> int:
    return sum(len(entry.tensors) for entry in entries if entry.keys[: len(path)] == path)


def _contents(value: object, kind: type[T]) -> str:
    """What a file holds that holds no weights."""
    if isinstance(value, dict) and value and not _is_optimizer(value):
        return ", ".join(f"{_joined(key)} ({_kind(inner, kind)})" for key, inner in islice(value.items(), _LISTED))
    return _kind(value, kind)


def _kind(value: object, kind: type[T], tensors: int = 0) -> str:
    """What this is, in a few words. tensors: how many a dictionary or network is known to hold by name."""
    if isinstance(value, kind):
        return "a single tensor"
    if _is_optimizer(value):
        return "an optimizer's state"
    if isinstance(value, dict):  # averages of weights may lie in a list, in the order of the weights
        few = islice(value.items(), _SAMPLED)
        lists = [f"{_joined(key)}: {_kind_of_list(inner, kind)}" for key, inner in few if _is_tensor_list(inner, kind)]
        inside = ([_tensors(tensors)] if tensors else []) + lists[:2]
        return ", ".join(inside) or ("a dictionary" if value else "an empty dictionary")
    if isinstance(value, (list, tuple)):
        return _kind_of_list(value, kind)
    if isinstance(value, Inert):
        return _tensors(tensors) if tensors else f"a record of {shown(value.name)}"
    return _PLAIN.get(type(value), "a note")


def _kind_of_list(values: Sequence[object], kind: type[T]) -> str:
    sample = values[:_SAMPLED]
    if not sample:
        return "an empty list"
    if _is_tensor_list(values, kind):
        return f"a list of {_tensors(len(values))}"
    if all(map(_is_optimizer, sample)):
        return "an optimizer's state"
    first: dict[str, None] = {}
    for value in sample[:3]:  # a list in a list is not looked into: there may be no end to it
        below = sum(isinstance(tensor, kind) for tensor in value.values()) if isinstance(value, dict) else 0
        first["a list" if isinstance(value, (list, tuple)) else _kind(value, kind, below)] = None
    return f"a list of {len(values):,} ({', '.join(first)})"


def _is_tensor_list(value: object, kind: type[T]) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, kind) for v in value[:_SAMPLED])


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'' if count == 1 else 's'}"


def _joined(*keys: Any) -> str:
    """A name of an entry, fit for a message."""
    return shown(".".join(shown(str(key), _KEY) for key in keys)) or WHOLE
