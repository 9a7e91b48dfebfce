"""Pickles of strangers, and what torch.save makes of them, read without calling anything.

A pickle is a program: it names functions, and has them called. Here its opcodes are read (by `pickletools`) and
kept as data instead: a global is its name (`Global`), what would be called stays a record of what and with which
arguments (`Object`), and a tensor is the place of its numbers in the file (`Saved`). So nothing of a file can run,
and a file that holds a class which is not installed here can be read as far as it matters.

What a pickle claims is bounded by what it is long: so many bytes, and so many numbers, strings and marks.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, NamedTuple

import torch

LONGEST = 1 << 24
"""Bytes of a pickle beyond which it is refused: of 20,000 tensors it has 3 MB."""

READS = 1_200_000
"""Numbers, strings and marks of a pickle beyond which it is refused; a tensor has 55."""

_DIRECTORY = 1 << 23  # bytes of a zip's directory: of 20,000 tensors 1.4 MB
_BLOCK = 1 << 20


class Global(NamedTuple):
    """The name of a class or function that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Object:
    """What a pickle would make by a call: which, its arguments, and the state that was set after it.

    Attributes:
        kind: the class or function.
        args: its positional arguments.
        state: a dict of attributes as a rule; None where none was set.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: Global, args: tuple[Any, ...]) -> None:
        self.kind, self.args, self.state = kind, args, None

    def __repr__(self) -> str:
        return f"Object({self.kind})"


class Saved(NamedTuple):
    """A tensor: its form, and where its numbers lie."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of its first number in the storage, in numbers
    storage: Storage

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return getattr(torch, self.dtype).itemsize


class Storage:
    """A run of bytes in the file that tensors lie in."""

    __slots__ = ("begin", "key", "length")

    def __init__(self, key: str, length: int) -> None:
        self.key, self.length = key, length
        self.begin: int | None = None  # its first byte; None of one that has no data in the file


# --- opcodes ----------------------------------------------------------------------------------------------


class _Bounded:
    """A pickle of which so many bytes are read, in so many pieces: each piece may make an object."""

    def __init__(self, stream: Any, longest: int, reads: int) -> None:
        self._stream = stream
        self._bytes, self._reads = longest, reads
        self._limits = (
            f"{longest:,} bytes or {reads:,} numbers, strings and marks, as of {reads // 55:,} tensors"
        )

    def read(self, count: int) -> bytes:
        self._spend(count)
        found = self._stream.read(count)
        if (
            found == b"\x8f"
        ):  # an empty set takes four times the memory of anything else, and no tensor has one
            self._reads -= 4
        return found

    def readline(self) -> bytes:
        line = self._stream.readline(self._bytes + 1)
        self._spend(len(line))
        return line

    def _spend(self, count: int) -> None:
        self._bytes -= count
        self._reads -= 1
        if count < 0 or self._bytes < 0 or self._reads < 0:
            raise ValueError(
                f"its pickle holds more than {self._limits}; save fewer in a file, or as safetensors"
            )


_PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
)  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack that a pickle's opcodes work on, with records in the place of calls."""

    def __init__(self, refer: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks under the marks
        self._memo: dict[int, Any] = {}
        self._refer = refer

    def run(self, stream: Any) -> Any:
        arg: Any
        for opcode, arg, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _VALUES:
                self.stack.append(arg)
            elif name in _PLAIN:
                self.stack.append(_PLAIN[name])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self._memo[arg] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self._memo[arg])
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                self._turn(name, arg)
        if self._below or len(self.stack) != 1:
            raise ValueError("its pickle does not end with one object")
        return self.stack[0]

    def _turn(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = _TUPLES[name]
                if len(stack) < count:
                    raise IndexError("its pickle takes more than there is")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                self._push(tuple(self._marked()))
            case "LIST":
                self._push(self._marked())
            case "DICT":
                items = self._marked()
                self._push({})
                self._set(self.stack[-1], items)
            case "FROZENSET":
                self._push(frozenset(self._marked()))
            case "APPEND":
                item = stack.pop()
                self._typed(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._marked()
                self._typed(list, self.stack[-1]).extend(items)
            case "ADDITEMS":
                items = self._marked()
                self._typed(set, self.stack[-1]).update(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set(stack[-1], [key, value])
            case "SETITEMS":
                items = self._marked()
                self._set(self.stack[-1], items)
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._marked()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "GLOBAL":
                stack.append(Global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                module, name = self._popped(2)
                stack.append(Global(self._typed(str, module), self._typed(str, name)))
            case "REDUCE" | "NEWOBJ":
                kind, args = self._popped(2)
                stack.append(_made(kind, args))
            case "NEWOBJ_EX":
                kind, args, _ = self._popped(3)
                stack.append(_made(kind, args))
            case "INST":
                self._push(_made(Global(*arg.split(" ", 1)), tuple(self._marked())))
            case "OBJ":
                kind, *args = self._marked()
                self._push(_made(kind, tuple(args)))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Object):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict | Saved):  # attributes of an OrderedDict or a tensor go
                    raise ValueError(f"its pickle sets the state of a {type(stack[-1]).__name__}")
            case "PERSID" | "BINPERSID":
                if self._refer is None:
                    raise ValueError("its pickle refers to something outside it")
                stack.append(self._refer(arg if name == "PERSID" else stack.pop()))
            case _:
                raise ValueError(f"its pickle has the opcode {name}, which no checkpoint needs")

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        items, self.stack = self.stack, self._below.pop()
        return items

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its pickle takes more than there is")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    @staticmethod
    def _typed(kind: type, value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def _set(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Object):  # a subclass of dict that is not known: its items do not matter
            return
        target = self._typed(dict, target)
        if len(items) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value


def _made(kind: Any, args: Any) -> Any:
    """What a call would make, if it is a container or a tensor as checkpoints have; else a record of the call."""
    if type(kind) is not Global or type(args) is not tuple:
        raise ValueError("its pickle calls what is no global")
    if known := _CALLS.get(kind):
        return known(*args)
    return Object(kind, args)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return dict(items) if isinstance(items, list | tuple | dict) else {}


def _default(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _ordered(items)


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    return tuple(numbers) if isinstance(numbers, list | tuple) else ()


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Saved:
    return _saved(storage, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any
) -> Saved:
    return _saved(storage, offset, shape, strides, dtype)


def _saved(typed: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Saved:
    if not isinstance(typed, _Typed):
        raise ValueError("it has a tensor without a storage")
    paired = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides)
    if not paired or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides)):
        raise ValueError(f"it has a tensor of the shape {shape} and the strides {strides}, at {offset}")
    kind = typed.dtype if dtype is None else dtype.name if isinstance(dtype, Global) else ""
    if not isinstance(getattr(torch, kind, None), torch.dtype):
        raise ValueError(f"it has a tensor of the type {kind}")
    return Saved(kind, shape, strides, offset, typed.storage)


def _attribute(owner: Any, *name: Any) -> Any:
    """A class inside another is pickled as a call of getattr, and is a name as well."""
    if isinstance(owner, Global) and len(name) == 1 and isinstance(name[0], str):
        return Global(owner.module, f"{owner.name}.{name[0]}")
    return Object(Global("builtins", "getattr"), (owner, *name))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _set_of(items: Any = ()) -> set[Any]:
    return set(items) if isinstance(items, list | tuple) else set()


_CALLS: dict[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _ordered,
    Global("collections", "defaultdict"): _default,
    Global("builtins", "getattr"): _attribute,
    Global("__builtin__", "getattr"): _attribute,
    Global("torch", "Size"): _size,
    Global("builtins", "set"): _set_of,
    Global("__builtin__", "set"): _set_of,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
"""What is made of the calls that checkpoints are full of; all others stay records."""


def unpickled(
    stream: Any, refer: Callable[[Any], Any] | None = None, longest: int = LONGEST, reads: int = READS
) -> Any:
    """What a pickle holds: numbers, strings, bytes, lists, tuples, sets, dicts, `Object`, `Global`, `Saved`.

    Args:
        stream: a binary file, read up to the pickle's end, or bytes.
        refer: what makes something of a persistent id; None refuses them.
        longest: bytes beyond which it is refused.
        reads: numbers, strings and marks beyond which it is refused.

    Raises:
        Exception: of any kind, for a pickle that is damaged; ValueError for one that is too large.
    """
    opened = io.BytesIO(stream) if isinstance(stream, bytes) else stream
    return _Machine(refer).run(_Bounded(opened, longest, reads))


# --- torch.save -------------------------------------------------------------------------------------------

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "QUInt8Storage": "quint8", "QInt8Storage": "qint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}  # fmt: skip


class _Typed(NamedTuple):
    storage: Storage
    dtype: str


class _Storages:
    """The storages that a pickle refers to."""

    def __init__(self, length_of: Callable[[str], int] | None) -> None:
        self._length_of = length_of
        self.found: dict[str, Storage] = {}
        self.itemsize: dict[str, int] = {}

    def __call__(self, pid: Any) -> _Typed:
        """What is made of ("storage", its type, key, device, elements, …)."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise ValueError("it refers to something else than storages")
        kind, key, count = pid[1], pid[2], pid[4]
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("it holds views of storages, as torch before 0.4 wrote")
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None:
            raise ValueError(f"it has a storage of the type {kind}")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 60:
            raise ValueError(f"it has a storage {key!r} of {count!r} elements")
        itemsize = getattr(torch, dtype).itemsize
        length = count * itemsize
        storage = self.found.setdefault(key, Storage(key, length))
        if storage.length != length:
            raise ValueError(f"it gives storage {key!r} two lengths")
        if self._length_of is not None and (stored := self._length_of(key)) != length:
            raise ValueError(f"storage {key!r} has {stored:,} bytes, not {length:,}")
        self.itemsize.setdefault(key, itemsize)
        return _Typed(storage, dtype)


def read_saved(opened: BinaryIO | io.RawIOBase, size: int) -> Any:
    """The object that torch.save wrote, its tensors as `Saved`.

    Args:
        opened: the file, unbuffered, at its begin.
        size: how many bytes it has.

    Raises:
        Exception: of any kind, if it is damaged, or was not written by torch.save.
    """
    first = opened.read(2)
    opened.seek(0)
    return _of_zip(opened, size) if first == b"PK" else _of_legacy(opened, size)


class _Record(NamedTuple):
    """Where a member of a zip lies in the file."""

    begin: int
    length: int


def _of_zip(opened: Any, size: int) -> Any:
    """What torch.save writes since 1.6: a zip of a pickle and of each storage, with their CRC-32."""
    with open_zip(opened, _DIRECTORY) as archive:
        entries = archive.infolist()
    pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise ValueError(f"it holds {len(pickles)} data.pkl where one is expected; it is not of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    records: dict[str, _Record] = {}
    reached = 0
    # torch.serialization.set_crc32_options(False) leaves all checksums 0.
    checked = any(entry.CRC for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename} is compressed or encrypted; it is not of torch.save")
        opened.seek(entry.header_offset)
        local = opened.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError(f"{entry.filename} is not where the zip's directory says")
        record = _Record(entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30])), entry.file_size)
        if entry.header_offset < reached or record.begin + record.length > size or entry.filename in records:
            raise ValueError(f"{entry.filename} lies in another record, or beyond the file's end")
        reached = record.begin + record.length
        records[entry.filename] = record
        if checked and _crc32(opened, record) != entry.CRC:
            raise ValueError(f"the checksum of {entry.filename} does not hold: bits of it have changed")

    def bytes_of(name: str, limit: int) -> bytes:
        record = records[prefix + name]
        if record.length > limit:
            raise ValueError(f"{name} has {record.length:,} bytes")
        opened.seek(record.begin)
        return opened.read(record.length)

    if prefix + "byteorder" in records and bytes_of("byteorder", 16) != b"little":
        raise ValueError("it was written on a big-endian machine; save it again on a common one")
    storages = _Storages(lambda key: records[f"{prefix}data/{key}"].length)
    found = unpickled(bytes_of("data.pkl", LONGEST), storages)
    for key, storage in storages.found.items():
        storage.begin = records[f"{prefix}data/{key}"].begin
    return found


def open_zip(opened: IO[bytes], limit: int) -> zipfile.ZipFile:
    """Open a zip whose directory has at most `limit` bytes; each of them may cost ten bytes of memory.

    Raises:
        ValueError: its directory is larger, or not at the file's end, where torch and numpy write it.
    """
    size = opened.seek(0, os.SEEK_END)
    opened.seek(max(0, size - 98))
    tail = opened.read(98)
    end = tail[-22:]
    if end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise ValueError("its zip's directory is not at its end")
    length = int.from_bytes(end[12:16], "little")
    if tail[-42:-38] == b"PK\x06\x07":  # of a large zip: its length stands in the record before
        length = int.from_bytes(tail[-58:-50], "little") if tail[-98:-94] == b"PK\x06\x06" else limit + 1
    if length > limit:
        raise ValueError(f"its zip's directory has {length:,} bytes, and up to {limit:,} are read")
    return zipfile.ZipFile(opened)


def _crc32(opened: BinaryIO, record: _Record) -> int:
    opened.seek(record.begin)
    crc, left = 0, record.length
    while left and (block := opened.read(min(_BLOCK, left))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def _of_legacy(opened: Any, size: int) -> Any:
    """What torch.save wrote before 1.6: pickles, then each storage behind its number of elements."""
    buffered = io.BufferedReader(opened)  # type: ignore[type-var]
    try:
        storages = _Storages(None)
        if unpickled(buffered) != 0x1950A86A20F9469CFC6C or unpickled(buffered) != 1001:
            raise ValueError("it begins as no file of torch.save does")
        unpickled(buffered)  # about the machine that wrote it
        found = unpickled(buffered, storages)
        keys = unpickled(buffered)
        begin = buffered.tell()
        for key in keys:
            storage = storages.found[key]
            buffered.seek(begin)
            count = int.from_bytes(buffered.read(8), "little")
            if count * storages.itemsize[key] != storage.length or begin + 8 + storage.length > size:
                raise ValueError(f"storage {key!r} of {storage.length:,} bytes is not whole")
            storage.begin = begin + 8
            begin += 8 + storage.length
        return found
    finally:
        buffered.detach()


# --- trees ------------------------------------------------------------------------------------------------


def saved_tensors(tree: Any) -> Iterator[tuple[tuple[Any, ...], Saved]]:
    """The tensors of an object and their keys on the way to them; what is there twice comes once.

    >>> list(saved_tensors({"a": [1, "b"]}))
    []
    """
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    while waiting:
        way, value = waiting.pop()
        if isinstance(value, Saved):
            yield way, value
        elif (isinstance(value, dict | list) or type(value) is tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*way, key), each) for key, each in items][::-1]
