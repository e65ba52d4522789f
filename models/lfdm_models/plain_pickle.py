"""Read a pickle of `torch.save` as plain values: nothing in it is imported, called or built, so no code can run.

torch's own reader for weights builds what a pickle describes before anything can be checked: a few bytes allocate
terabytes, and a deeply nested key crashes the interpreter. Here, a tensor stays a description.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

from lfdm_models.stored_values import (
    ENDED,
    KEY_TYPES,
    DamagedFileError,
    Global,
    NumpyType,
    Opaque,
    Storage,
    StoredFileError,
    StoredTensor,
    as_size,
    called,
    known,
)

#: More than in any checkpoint: about 30 per tensor, one per number of a list. Reading that many takes a second.
_MOST_OPERATIONS = 500_000
#: Modules with another name in Python 2.
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_CONSTANTS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
    }
)  # fmt: skip
_Handler: TypeAlias = "Callable[[PlainUnpickler, Any], object]"


class PlainUnpickler:
    """Reads one pickle.

    Attributes:
        storages: storages found while reading, by key.
    """

    def __init__(self) -> None:
        """Start with an empty stack."""
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> object:
        """Read the pickle at the file's position; afterwards the position is after its end.

        Args:
            file: of bounded size.

        Returns:
            Dicts, lists, tuples, strings, bytes, numbers, None, `StoredTensor` and `Opaque`, nested to any depth and
            possibly shared: a caller that traverses them must bound the traversal. Keys of dicts are plain.

        Raises:
            ForeignObjectError: it would import something that is not known to be plain.
            StoredFileError: it is damaged, or has more operations than any checkpoint.
        """
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count > _MOST_OPERATIONS:
                    raise StoredFileError(f"its pickle has more than {_MOST_OPERATIONS} operations")
                if opcode.name in _CONSTANTS:
                    self._stack.append(argument)
                elif opcode.name == "STOP":
                    return self._stack.pop()
                else:
                    handler = _HANDLERS.get(opcode.name)
                    if handler is None:
                        raise StoredFileError(
                            f"its pickle uses {opcode.name}, which torch.save's own pickle protocol does not"
                        )
                    handler(self, argument)
        except StoredFileError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise DamagedFileError(ENDED) from error
        raise DamagedFileError(ENDED)

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise DamagedFileError(ENDED)
        items = tuple(self._stack[len(self._stack) - size :])
        del self._stack[len(self._stack) - size :]
        self._stack.append(items)

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], Opaque):
            raise DamagedFileError(ENDED)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, KEY_TYPES):
                if isinstance(target, Opaque):
                    continue
                raise StoredFileError(f"a key of one of its dicts is a {type(key).__name__}, expected a plain name")
            if isinstance(target, dict):
                target[key] = value
            elif not isinstance(target, Opaque):
                raise DamagedFileError(ENDED)

    def _global(self, module: str, name: str) -> None:
        self._stack.append(known(_PYTHON2.get(module, module), name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedFileError(ENDED)
        self._global(module, name)

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise DamagedFileError(ENDED)
        self._stack.append(called(function.name, arguments))

    def _build(self) -> None:
        state, built = self._stack.pop(), self._stack[-1]
        if isinstance(built, NumpyType):
            built.order = ">" if isinstance(state, tuple) and ">" in state[1:2] else "<"
        elif not isinstance(built, dict | Opaque | StoredTensor):
            raise DamagedFileError(ENDED)

    def _persistent(self) -> None:
        saved = self._stack.pop()
        if not isinstance(saved, tuple) or saved[:1] not in (("storage",), (b"storage",)) or len(saved) not in (5, 6):
            raise StoredFileError("its pickle refers to something other than a storage of numbers")
        _, kind, key, _, count = saved[:5]
        if not isinstance(kind, Global) or not kind.name.startswith("storage ") or not isinstance(key, str):
            raise DamagedFileError(ENDED)
        storage = Storage(key, kind.name.removeprefix("storage "), as_size(count))
        self.storages.setdefault(key, storage)
        if len(saved) == 6 and saved[5] is not None:
            _, begin, part = saved[5]
            storage = Storage(key, storage.dtype, as_size(part), as_size(begin))
        self._stack.append(storage)

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]


_HANDLERS: Mapping[str, _Handler] = {
    "PROTO": lambda *_: None,
    "FRAME": lambda *_: None,
    "NONE": lambda reader, _: reader._stack.append(None),
    "NEWTRUE": lambda reader, _: reader._stack.append(True),
    "NEWFALSE": lambda reader, _: reader._stack.append(False),
    "EMPTY_DICT": lambda reader, _: reader._stack.append({}),
    "EMPTY_LIST": lambda reader, _: reader._stack.append([]),
    "EMPTY_TUPLE": lambda reader, _: reader._stack.append(()),
    "EMPTY_SET": lambda reader, _: reader._stack.append(Opaque("set")),
    "BYTEARRAY8": lambda reader, _: reader._stack.append(Opaque("bytearray")),
    "MARK": lambda reader, _: reader._marks.append(len(reader._stack)),
    "POP": lambda reader, _: reader._stack.pop(),
    "POP_MARK": lambda reader, _: reader._since_mark(),
    "TUPLE": lambda reader, _: reader._stack.append(tuple(reader._since_mark())),
    "TUPLE1": lambda reader, _: reader._tuple(1),
    "TUPLE2": lambda reader, _: reader._tuple(2),
    "TUPLE3": lambda reader, _: reader._tuple(3),
    "APPEND": lambda reader, _: reader._extend([reader._stack.pop()]),
    "APPENDS": lambda reader, _: reader._extend(reader._since_mark()),
    "ADDITEMS": lambda reader, _: reader._extend(reader._since_mark()),
    "FROZENSET": lambda reader, _: reader._stack.append(Opaque(f"frozenset of {len(reader._since_mark())}")),
    "SETITEM": lambda reader, _: reader._set_items([reader._stack.pop(-2), reader._stack.pop()]),
    "SETITEMS": lambda reader, _: reader._set_items(reader._since_mark()),
    "GLOBAL": lambda reader, argument: reader._global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader._stack_global(),
    "REDUCE": lambda reader, _: reader._call(),
    "NEWOBJ": lambda reader, _: reader._call(),
    "BUILD": lambda reader, _: reader._build(),
    "BINPERSID": lambda reader, _: reader._persistent(),
    "BINPUT": lambda reader, argument: reader._put(argument),
    "LONG_BINPUT": lambda reader, argument: reader._put(argument),
    "MEMOIZE": lambda reader, _: reader._put(len(reader._memo)),
    "BINGET": lambda reader, argument: reader._stack.append(reader._memo[argument]),
    "LONG_BINGET": lambda reader, argument: reader._stack.append(reader._memo[argument]),
}
