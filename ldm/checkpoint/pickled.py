"""Reading a pickle as data. Nothing that it names is imported, and nothing in it is called.

A pickle is a program for a small stack machine. `read_pickle` runs it on a machine of its own on which a global is only
a name: the few names that stand for tensors and plain containers have a builder, and "calling" any other name gives a
`LeftOut`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from ldm.checkpoint.builders import BUILDERS, DTYPES, Global, LeftOut, keys

_OUT = object()

# Opcodes whose argument, as pickletools decodes it, is the value itself.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Machine:
    """The stack machine that pickles are written for, reduced to values that run no code."""

    def __init__(self, persistent_load: Callable[[Any], Any]) -> None:
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            else:
                handler = getattr(self, f"do_{opcode.name.lower()}", None)
                if handler is None:
                    raise ValueError(f"pickle opcode {opcode.name}")
                handler(argument)
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global):
            return LeftOut(getattr(function, "name", type(function).__name__))
        builder = BUILDERS.get(function.name)
        return LeftOut(function.name) if builder is None else builder(*args)

    def put_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(keys(items[::2]), items[1::2], strict=True))
        elif not isinstance(target, LeftOut):
            raise ValueError(f"items set on {type(target).__name__}")

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, LeftOut):
            raise ValueError(f"items appended to {type(target).__name__}")

    # Framing and the stack itself.

    def do_proto(self, _: Any) -> None:
        pass

    do_frame = do_proto

    def do_mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def do_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def do_pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def do_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def do_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_binget = do_long_binget = do_get

    # Containers.

    def do_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def do_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def do_empty_set(self, _: Any) -> None:
        self.stack.append(set())

    def do_list(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append(items)

    def do_dict(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.put_items(items)

    def do_frozenset(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append(frozenset(keys(items)))

    def do_tuple(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append(tuple(items))

    def last_as_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("pickle stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def do_tuple1(self, _: Any) -> None:
        self.last_as_tuple(1)

    def do_tuple2(self, _: Any) -> None:
        self.last_as_tuple(2)

    def do_tuple3(self, _: Any) -> None:
        self.last_as_tuple(3)

    def do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put_items([key, value])

    def do_setitems(self, _: Any) -> None:
        self.put_items(self.pop_to_mark())

    def do_append(self, _: Any) -> None:
        self.append_items([self.stack.pop()])

    def do_appends(self, _: Any) -> None:
        self.append_items(self.pop_to_mark())

    def do_additems(self, _: Any) -> None:
        items = self.pop_to_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(keys(items))
        elif not isinstance(self.stack[-1], LeftOut):
            raise ValueError(f"items added to {type(self.stack[-1]).__name__}")

    # Names, and what pickle would call.

    def do_global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)  # pickletools gives "module name"
        self.stack.append(DTYPES.get(name) or Global(name))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a global whose name is no text")
        self.do_global(f"{module} {name}")

    def do_reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(LeftOut(getattr(function, "name", "object")) if keywords else self.call(function, args))

    def do_inst(self, argument: str) -> None:
        args = self.pop_to_mark()
        self.do_global(argument)
        self.stack.append(self.call(self.stack.pop(), args))

    def do_obj(self, _: Any) -> None:
        function, *args = self.pop_to_mark()
        self.stack.append(self.call(function, args))

    def do_build(self, _: Any) -> None:
        self.stack.pop()  # the attributes of an object; what we build has none

    def do_binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent_load(self.stack.pop()))


def read_pickle(file: BinaryIO, persistent_load: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the position of `file`, which is left just behind it. May hold `LeftOut`s.

    `persistent_load` turns a persistent id, torch's description of a storage, into a 1-D tensor.
    A broken pickle raises whatever it trips over: the caller names the file.
    """
    return _Machine(persistent_load).run(file)


def without_left_out(value: Any) -> tuple[Any, list[str]]:
    """`value` with no `LeftOut` and no `Global` in it, and the sorted names of those.

    They are dropped from dicts, with their key or value, and become None elsewhere.
    """
    names: set[str] = set()
    done: dict[int, tuple[Any, Any]] = {}  # id -> (the container, kept alive so that its id stays its own; the result)

    def clean(item: Any) -> Any:
        if isinstance(item, LeftOut | Global):
            names.add(item.name)
            return _OUT
        if not isinstance(item, dict | list | tuple | set | frozenset):
            return item
        if id(item) not in done:
            done[id(item)] = (item, item)  # a container may hold itself
            if isinstance(item, dict):
                pairs = [(clean(key), clean(part)) for key, part in item.items()]
                item.clear()
                item.update((key, part) for key, part in pairs if key is not _OUT and part is not _OUT)
            elif isinstance(item, list):
                item[:] = map(clean_or_none, item)
            else:
                done[id(item)] = (item, type(item)(map(clean_or_none, item)))
        return done[id(item)][1]

    def clean_or_none(item: Any) -> Any:
        cleaned = clean(item)
        return None if cleaned is _OUT else cleaned

    return clean_or_none(value), sorted(ascii(name)[1:-1] for name in names)
