"""Reader of a pickle as data. Nothing that it names is imported, and nothing in it is called.

It subclasses the standard library's unpickler in Python, which is shorter by half than a stack machine of our own: the
opcodes that move plain values stay as they are, and those that look up, call, hash or fill are replaced. A global is
only a name; the few names that stand for tensors and plain containers have a builder, and "calling" any other name
gives a `LeftOut`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

from ldm.checkpoint.builders import DTYPES, Global, LeftOut, keys

_OUT = object()


class _Unpickler(pickle._Unpickler):
    """Unpickler of values that run no code."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(file, encoding="latin1")
        self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return DTYPES.get(full) or Global(full)

    def _fill(self, kind: type, put: Callable[[Any, list[Any]], None], items: list[Any]) -> None:
        """Put `items` into the value on the stack, which must be of `kind`; those of a `LeftOut` are left out too."""
        target = self.stack[-1]
        if isinstance(target, kind):
            put(target, items)
        elif not isinstance(target, LeftOut):
            raise ValueError(f"items put into {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        self._fill(dict, lambda target, new: target.update(zip(keys(new[::2]), new[1::2], strict=True)), items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_append(self) -> None:
        self._fill(list, list.extend, [self.stack.pop()])

    def load_appends(self) -> None:
        self._fill(list, list.extend, self.pop_mark())

    def load_additems(self) -> None:
        self._fill(set, set.update, keys(self.pop_mark()))

    def load_frozenset(self) -> None:
        self.append(frozenset(keys(self.pop_mark())))

    def load_build(self) -> None:
        self.stack.pop()  # the attributes of an object; the values that are built here have none

    def load_newobj(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(function(*args))

    def load_newobj_ex(self) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(LeftOut(getattr(function, "name", "object")) if keywords else function(*args))

    def load_refused(self) -> None:
        raise ValueError("a pickle opcode that no checkpoint has")

    for _code, _method in {
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.DICT: load_dict,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.ADDITEMS: load_additems,
        pickle.FROZENSET: load_frozenset,
        pickle.BUILD: load_build,
        pickle.NEWOBJ: load_newobj,
        pickle.REDUCE: load_newobj,
        pickle.NEWOBJ_EX: load_newobj_ex,
        # The registry of extensions is code of this process; the others reserve as much memory as the file claims.
        **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), load_refused),
        **dict.fromkeys((pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), load_refused),
    }.items():
        dispatch[_code[0]] = _method


def read_pickle(file: BinaryIO, persistent_load: Callable[[Any], Any]) -> Any:
    """Return the value of the pickle at the position of `file`, which is left just behind it. May hold `LeftOut`s.

    `persistent_load` turns a persistent id, torch's description of a storage, into a 1-D tensor.
    A broken pickle raises whatever it trips over: the caller names the file.
    """
    return _Unpickler(file, persistent_load).load()


class _Cleaner:
    """Remover of `LeftOut`s and `Global`s. A class and no nested functions: a cycle would keep the tensors alive."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        # id of a container -> (the container, kept alive so that its id stays its own; the result)
        self._done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, item: Any) -> Any:
        if isinstance(item, LeftOut | Global):
            self.names.add(item.name)
            return _OUT
        if not isinstance(item, dict | list | tuple | set | frozenset):
            return item
        if id(item) not in self._done:
            self._done[id(item)] = (item, item)  # a container may hold itself
            if isinstance(item, dict):
                pairs = [(self(key), self(part)) for key, part in item.items()]
                item.clear()
                item.update((key, part) for key, part in pairs if key is not _OUT and part is not _OUT)
            elif isinstance(item, list):
                item[:] = map(self.or_none, item)
            else:
                self._done[id(item)] = (item, type(item)(map(self.or_none, item)))
        return self._done[id(item)][1]

    def or_none(self, item: Any) -> Any:
        cleaned = self(item)
        return None if cleaned is _OUT else cleaned


def without_left_out(value: Any) -> tuple[Any, list[str]]:
    """Return `value` with no `LeftOut` and no `Global` in it, and the sorted names of those.

    They are dropped from dicts, with their key or value, and become None elsewhere.
    """
    cleaner = _Cleaner()
    cleaned = cleaner.or_none(value)
    return cleaned, sorted(ascii(name)[1:-1] for name in cleaner.names)
