"""The values that a pickle of weights may contain: plain types, and known functions that are never called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_AXES = 16
_LARGEST_SIZE = 1 << 48
ENDED = "its pickle ends too early, or says what no pickle does"


class StoredFileError(ValueError):
    """A file of weights is damaged or invalid; the text states the problem, without the file's name."""


class DamagedFileError(StoredFileError):
    """A file of weights is incomplete; another copy may be complete."""


class ForeignObjectError(StoredFileError):
    """A pickle names something that is not a plain value.

    Attributes:
        name: name of what it would import.
    """

    def __init__(self, name: str) -> None:
        """Keep the name."""
        super().__init__(f"it holds a Python object ({name}) that could run code when loaded")
        self.name = name


@dataclass(frozen=True)
class Opaque:
    """A value that exists in the file, but is not read.

    Attributes:
        kind: its kind, for messages.
    """

    kind: str


@dataclass(frozen=True)
class OddTensor(Opaque):
    """A tensor that is not a dense array of numbers in the file."""


@dataclass(frozen=True)
class Storage:
    """A contiguous range of numbers in the file.

    Attributes:
        key: its name in the file.
        dtype: name of a torch dtype; "uint8" where the tensors define the type.
        count: number of elements.
        begin: index of the first element, for a part of another storage.
    """

    key: str
    dtype: str
    count: int
    begin: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """An ordinary dense tensor: a view of a storage.

    Attributes:
        storage: storage of its numbers.
        dtype: name of a torch dtype.
        offset: index of its first number in the storage.
        shape, strides: as in torch.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Global:
    """A name that a pickle would import."""

    name: str


@dataclass
class NumpyType:
    """A NumPy dtype, whose byte order follows its name."""

    code: str
    order: str = "<"


_STORAGE_TYPES = {
    "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Double": "float64", "Float": "float32", "Half": "float16", "Int": "int32",
    "Long": "int64", "Short": "int16", "Untyped": "uint8",
}  # fmt: skip
_DTYPES = frozenset(_STORAGE_TYPES.values()) | {
    "complex32", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "uint16", "uint32", "uint64",
}  # fmt: skip
#: Kinds of tensors that are not dense numbers in the file, by the function that would rebuild them.
_ODD_TENSORS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on device meta",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
}
#: Plain values beside the weights in many checkpoints that are not needed: known, but not read.
_UNREAD = frozenset(
    {
        "argparse.Namespace", "builtins.bytearray", "builtins.complex", "builtins.frozenset", "builtins.set",
        "collections.Counter", "collections.defaultdict", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath",
        "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "torch.Tensor", "torch.device",
        "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion", "builtins.dict", "builtins.float", "builtins.int", "builtins.list",
        "builtins.str", *(f"{core}.multiarray._reconstruct" for core in ("numpy.core", "numpy._core")),
        *(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core")),
        *(f"torch.{scheme}_{kind}" for scheme in ("per_tensor", "per_channel") for kind in ("affine", "symmetric")),
        "torch.per_channel_affine_float_qparams", "builtins.Ellipsis", "builtins.bool", "builtins.bytes",
        "builtins.long", "builtins.range", "builtins.tuple", "builtins.unicode", "builtins.xrange",
        "collections.deque", "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
        "datetime.timezone", "decimal.Decimal", "fractions.Fraction", "pathlib.PurePath", "pathlib.PureWindowsPath",
        "pathlib._local.Path", "pathlib._local.PurePosixPath", "pathlib._local.WindowsPath", "types.SimpleNamespace",
        "uuid.UUID",
    }
)  # fmt: skip
KEY_TYPES = (str, int, float, bytes, type(None))


def called(name: str, arguments: tuple[Any, ...]) -> object:
    """The value that a call of a known function represents.

    Raises:
        StoredFileError: the arguments are invalid.
        TypeError, ValueError: likewise.
    """
    if name in _ODD_TENSORS:
        return OddTensor(_ODD_TENSORS[name])
    if name in _UNREAD:
        return Opaque("numpy.ndarray" if name.startswith("numpy.") else name.removeprefix("builtins."))
    if name not in _CALLS:
        raise DamagedFileError(ENDED)
    return _CALLS[name](*arguments)


def as_size(value: object) -> int:
    """An entry of a tensor's shape.

    Raises:
        StoredFileError: it is not a valid size.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST_SIZE:
        raise StoredFileError("it declares a tensor of a size that no tensor has; it is damaged or not to be trusted")
    return value


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_AXES:
        raise StoredFileError(f"it declares a tensor of more than {_MOST_AXES} axes, or of none that are numbers")
    return tuple(map(as_size, values))


def _tensor(storage: object, offset: object, shape: object, strides: object, *rest: Any) -> object:
    """`torch._utils._rebuild_tensor_v2`, and the older version without arguments after the strides."""
    if len(rest) > 2 and rest[2]:
        return OddTensor("a tensor that is conjugated or negated when read")
    return _tensor_of(storage, None, offset, shape, strides)


def _tensor_v3(storage: object, offset: object, shape: object, strides: object, *rest: Any) -> object:
    if len(rest) > 3 and rest[3]:
        return OddTensor("a tensor that is conjugated or negated when read")
    return _tensor_of(storage, rest[2], offset, shape, strides)


def _tensor_of(storage: object, dtype: object, offset: object, shape: object, strides: object) -> object:
    if not isinstance(storage, Storage):
        raise DamagedFileError(ENDED)
    name = dtype.name.removeprefix("dtype ") if isinstance(dtype, Global) else storage.dtype
    if name not in _DTYPES:
        return OddTensor(f"a tensor of type {name}")
    axes, steps = _sizes(shape), _sizes(strides)
    if len(axes) != len(steps):
        raise DamagedFileError(ENDED)
    # torch's own 64-bit counts must not overflow.
    count = 1
    for size in axes:
        count *= max(size, 1)
    if count > 1 << 60:
        raise StoredFileError("it declares a tensor of a size that no tensor has; it is damaged or not to be trusted")
    return StoredTensor(storage, name, storage.begin + as_size(offset), axes, steps)


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _from_type(function: object, _: object, arguments: object, *__: object) -> object:
    if not isinstance(function, Global) or not isinstance(arguments, tuple) or function.name not in _TENSORS:
        return OddTensor("a tensor subclass")
    return _TENSORS[function.name](*arguments)


def _ordered_dict(items: object = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple) or not all(
        isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], KEY_TYPES) for item in items
    ):
        raise DamagedFileError(ENDED)
    return dict(items)


def _encoded(text: object, codec: object = "utf-8") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "utf-8", b"latin1"):
        raise DamagedFileError(ENDED)
    return text.encode("latin-1" if codec != "utf-8" else "utf-8")


def _numpy_type(code: object, *_: object) -> NumpyType:
    if not isinstance(code, str):
        raise DamagedFileError(ENDED)
    return NumpyType(code)


def _numpy_scalar(kind: object, data: object = b"") -> object:
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes) or kind.code[:1] not in tuple("biuf"):
        return Opaque("a NumPy scalar")
    dtype = np.dtype(kind.order + kind.code)
    return np.frombuffer(data, dtype, count=1)[0].item()


def _shape(sizes: object = ()) -> object:
    return sizes if isinstance(sizes, tuple) else Opaque("torch.Size")


_TENSORS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_CALLS: Mapping[str, Callable[..., object]] = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _shape,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


def known(module: str, name: str) -> Global:
    """A name that a pickle would import.

    Raises:
        ForeignObjectError: it is not known to be plain.
    """
    full = f"{module}.{name}"
    if name.endswith("Storage") and module in ("torch", "torch.cuda", "torch.storage"):
        kind = name.removesuffix("Storage")
        return Global(f"storage {_STORAGE_TYPES.get(kind, kind)}")
    if module == "torch" and name in _DTYPES:
        return Global(f"dtype {name}")
    if full in _CALLS or full in _UNREAD or full in _ODD_TENSORS:
        return Global(full)
    raise ForeignObjectError(full.removeprefix("builtins."))
