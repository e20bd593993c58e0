"""Reader of pickles as data. It imports no name and calls no object of the pickle.

It subclasses the Python unpickler of the standard library, which takes half the code of a separate stack machine. The
opcodes for plain values are inherited. Those that look up, call, hash or fill objects are replaced. A global is only a
name. Names of tensors and plain containers have a builder, and "calling" any other name gives a `LeftOut`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

from ldm.checkpoint.builders import DTYPES, Global, LeftOut, keys

_OUT = object()


class _Unpickler(pickle._Unpickler):
    """Unpickler that runs no code of the pickle."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(file, encoding="latin1")
        self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return DTYPES.get(full) or Global(full)

    def _fill(self, kind: type, put: Callable[[Any, list[Any]], None], items: list[Any]) -> None:
        """Put `items` into the value of `kind` on the stack. Items of a `LeftOut` are dropped."""
        target = self.stack[-1]
        if isinstance(target, kind):
            put(target, items)
        elif not isinstance(target, LeftOut):
            raise ValueError(f"items for a {type(target).__name__}")

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
        self.stack.pop()  # attributes of an object; built values have none

    def load_newobj(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(function(*args))

    def load_newobj_ex(self) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(LeftOut(getattr(function, "name", "object")) if keywords else function(*args))

    def load_refused(self) -> None:
        raise ValueError("an unsupported pickle opcode")

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
        # Extensions are code of this process. The other opcodes allocate the size that the file claims.
        **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), load_refused),
        **dict.fromkeys((pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), load_refused),
    }.items():
        dispatch[_code[0]] = _method


def read_pickle(file: BinaryIO, persistent_load: Callable[[Any], Any]) -> Any:
    """Return the value of the pickle at the position of `file`, and leave the position after it.

    The value may contain `LeftOut`s. `persistent_load` maps a persistent id, torch's description of a storage, to a 1-D
    tensor. A damaged pickle raises various exceptions, and the caller names the file.
    """
    return _Unpickler(file, persistent_load).load()


class _Cleaner:
    """Removal of `LeftOut`s and `Global`s. Nested functions would form a cycle that keeps the tensors alive."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        # by id of a container: the container, kept alive so that the id stays valid, and the result
        self._done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, item: Any) -> Any:
        if isinstance(item, LeftOut | Global):
            self.names.add(item.name)
            return _OUT
        if not isinstance(item, dict | list | tuple | set | frozenset):
            return item
        if id(item) not in self._done:
            self._done[id(item)] = (item, item)  # a container may contain itself
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
    """Return `value` without `LeftOut`s and `Global`s, and their sorted names.

    In dicts, the item is dropped. Elsewhere, they become None.
    """
    cleaner = _Cleaner()
    cleaned = cleaner.or_none(value)
    return cleaned, sorted(ascii(name)[1:-1] for name in cleaner.names)
