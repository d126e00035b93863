"""Pickles run as data, on a stack machine that builds containers and asks a table about everything else.

`pickletools` of the standard library splits the bytes into instructions without obeying any. Here they are obeyed,
as far as a model file needs them: a name is looked up in the `Vocabulary` alone, never imported; an object of an
unknown class is an `Inert` record of what the file says about it. All work is bounded: bytes read, instructions,
and whatever is copied by a call.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.source import Source, shown

__all__ = ["Described", "Function", "Inert", "Refused", "StandIn", "Vocabulary", "unpickle"]

# A network of the published sizes takes about 200,000 instructions in 1 MB.
_INSTRUCTIONS = 2_000_000
_BYTES = 32 << 20
_DIGITS = 16  # bytes of an integer; sizes take 8, the magic number of torch 10


class Refused(Exception):  # noqa: N818 - a verdict, turned into a `CheckpointError` with the file's name
    """Something a model file never needs; the message names it."""


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """What a name that may be called does: a tuple of plain values to a value. May raise ValueError or `Refused`.

    copies: whether a call takes time or memory as its arguments are long.
    """

    call: Callable[[tuple[Any, ...]], object]
    copies: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """A class of the file by name. It is never resolved; its instances are `Inert`."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """An instance of a stand-in: the name of its class, and the attributes and items the file gives it."""

    name: str
    state: dict[Any, Any] | None = None
    items: dict[Any, Any] | None = None  # of a class that is a dict


class Described:
    """Base of what a function may return that takes attributes which mean nothing to us."""

    __slots__ = ()


@dataclass(frozen=True)
class Vocabulary:
    """All that a pickle may name: `known` by dotted name, and any class of `modules` and below as a stand-in."""

    known: Mapping[str, object]
    modules: tuple[str, ...] = ()

    def find(self, module: str, name: str) -> object:
        """The meaning of a name. Raises `Refused` for an unknown one."""
        dotted = f"{module}.{name}"
        if dotted in self.known:
            return self.known[dotted]
        if name.isidentifier() and any(module == known or module.startswith(f"{known}.") for known in self.modules):
            return StandIn(dotted)
        raise Refused(shown(dotted))


def unpickle(
    source: Source,
    vocabulary: Vocabulary = Vocabulary({}),
    persistent: Callable[[object], object] | None = None,
    limit: int = _BYTES,
) -> Any:
    """The value of the pickle that begins here; the source then stands behind it.

    persistent: gives a meaning to persistent ids; may raise ValueError. limit: bytes that it may have. Raises
    `CheckpointError`.
    """
    try:
        with source.limited(limit):
            return _Machine(vocabulary, persistent).run(source)
    except Refused as what:
        raise source.refused(str(what)) from None
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = shown(str(error)) if isinstance(error, ValueError) and str(error) else "its instructions do not fit"
        raise source.broken(reason) from error


class _Machine:
    """A stack for the innermost mark, the stacks below it, and the memo."""

    def __init__(self, vocabulary: Vocabulary, persistent: Callable[[object], object] | None) -> None:
        self.vocabulary, self.persistent = vocabulary, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.budget = _INSTRUCTIONS

    def run(self, source: Source) -> Any:
        for opcode, argument, _ in pickletools.genops(source):  # type: ignore[arg-type]
            self.spend(1)
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("a pickle has no end")

    def spend(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise ValueError(f"a pickle takes more than {_INSTRUCTIONS:,} instructions")

    def step(self, name: str, argument: Any) -> None:
        """Obey one instruction; the frequent ones come first."""
        stack = self.stack
        match name:
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "REDUCE":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "EMPTY_TUPLE":
                stack.append(())
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE":
                self.unmark().append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _items(stack[-1])[_key(key)] = value
            case "SETITEMS":
                target = _items(self.unmark()[-1])
                for key, value in zip(stack[::2], stack[1::2], strict=True):
                    target[_key(key)] = value
            case "APPEND":
                value = stack.pop()
                _of(stack[-1], list).append(value)
            case "APPENDS":
                _of(self.unmark()[-1], list).extend(stack)
            case "ADDITEMS":
                _of(self.unmark()[-1], set).update(map(_key, stack))
            case "BINPERSID":
                if self.persistent is None:
                    raise Refused("a persistent id")
                stack.append(self.persistent(stack.pop()))
            case "NEWOBJ":
                arguments, cls = stack.pop(), stack.pop()
                if not isinstance(cls, StandIn) or type(arguments) is not tuple or arguments:
                    raise Refused("an object made with arguments or of no class")
                stack.append(Inert(cls.name))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case "GLOBAL":
                stack.append(self.vocabulary.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.vocabulary.find(_of(module, str), _of(attribute, str)))
            case "LONG1" | "LONG4":
                if argument.bit_length() > 8 * _DIGITS:
                    raise ValueError(f"an integer has more than {_DIGITS} bytes")
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.unmark()
            case "PROTO" | "FRAME":
                pass
            case _:
                raise Refused(f"the pickle instruction {name}")

    def unmark(self) -> list[Any]:
        """Go back to the stack below the innermost mark."""
        self.stack = self.below.pop()
        return self.stack

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Function):
            raise Refused(f"a call of {shown(function.name) if isinstance(function, StandIn) else 'a plain value'}")
        if not isinstance(arguments, tuple):
            raise ValueError("a call has no tuple of arguments")
        if function.copies:
            self.spend(sum(len(value) for value in arguments if isinstance(value, (list, tuple, dict, str, bytes))))
        return function.call(arguments)

    def build(self, target: object, state: object) -> None:
        """Give an object its attributes. Those of a dictionary (torch keeps notes there) are left out."""
        if isinstance(target, Inert):
            if target.state is not None or not isinstance(state, dict):
                raise ValueError(f"{shown(target.name)} has odd attributes")
            self.spend(len(state))
            for name in state:
                if not isinstance(name, str):
                    raise ValueError(f"{shown(target.name)} has an attribute without a name")
                if name.startswith("__"):
                    raise Refused(f"setting {shown(name)}")
            target.state = state
        elif not isinstance(target, (dict, Described)):
            raise Refused("attributes of a plain value")


def _of(value: Any, kind: type) -> Any:
    """`value`, which must be exactly of `kind`."""
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} is needed, a {type(value).__name__} is there")
    return value


def _items(value: Any) -> dict[Any, Any]:
    """Where items of a dictionary go, or of an instance whose class is one."""
    if type(value) is Inert:
        value.items = {} if value.items is None else value.items
        return value.items
    found: dict[Any, Any] = _of(value, dict)
    return found


def _key(value: object) -> str | float | None:
    """A key of a dictionary or a member of a set; anything nested could take for ever to hash."""
    if type(value) in (str, bool, float, type(None)) or (type(value) is int and value.bit_length() < 64):
        return value  # type: ignore[return-value]
    raise Refused(f"a {type(value).__name__} as a key")
