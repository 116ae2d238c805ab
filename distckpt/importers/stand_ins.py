"""What a pickle may name, and the stand-in that each name gets: data only, no library's code (restricted_unpickler.py)."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from distckpt.format.dtypes import is_known, itemsize

MAX_DIMS: Final = 64
MAX_EXPANDED: Final = 1 << 30
"""Most bytes of a tensor that shows the same elements several times (stride 0)."""

_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_DS: Final = "deepspeed."
_DCP: Final = "torch.distributed.checkpoint."
PROFILES: Final[Mapping[str, frozenset[str]]] = {
    "torch": frozenset(),
    "deepspeed": frozenset(
        {
            f"{_DS}runtime.fp16.loss_scaler.LossScaler",
            f"{_DS}runtime.fp16.loss_scaler.DynamicLossScaler",
            f"{_DS}runtime.fp16.loss_scaler.LossScalerBase",
            f"{_DS}runtime.zero.config.ZeroStageEnum",
            f"{_DS}utils.tensor_fragment.fragment_address",
            f"{_DS}utils.mixed_precision_linkage.fragment_address",
            f"{_DS}runtime.bf16_optimizer.fragment_address",
            f"{_DS}checkpoint.universal_checkpoint.SubparamShape",
            "argparse.Namespace",
        }
    ),
    "dcp": frozenset(
        {f"{_DCP}metadata.{name}" for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )}
        | {f"{_DCP}filesystem._StorageInfo", f"{_DCP}filesystem._StoragePrefix", f"{_DCP}filesystem.StorageMeta"}
    ),
}  # fmt: skip
"""Classes that are read as their attributes alone, by what is being imported; their code is neither needed nor run."""


class Refused(Exception):
    """A pickle names something that is not on the list."""


class Unreadable(Exception):
    """A file is damaged, or of a kind that is not supported."""


# ---------------------------------------------------------------- stand-ins


@dataclass(frozen=True, eq=False)
class Named:
    """A storage class, dtype or other global that stands for itself."""

    name: str
    dtype: str | None = None


@dataclass(eq=False)
class Storage:
    """``dtype`` None: counted in bytes. ``start`` is the absolute file offset, known late in the legacy format."""

    dtype: str | None
    numel: int
    start: int = -1


@dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage; ``offset`` and ``stride`` in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """An object of a listed class: its constructor's arguments and its attributes, as data."""

    qualname = ""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        """Keep the arguments; pickles may skip ``__init__``, never this."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class NumpyDtype:
    """A NumPy dtype, by its text (``f8``)."""

    def __init__(self, text: str, *_: Any) -> None:
        self.text, self.order = str(text), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class NumpyArray:
    """A NumPy array or scalar, as its bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _scalar(dtype: NumpyDtype, raw: bytes) -> NumpyArray:
    found = NumpyArray()
    found.state = (None, (), dtype, False, raw)
    return found


def _tensor_v2(storage: Storage, offset: int, shape: Any, stride: Any, *more: Any) -> Tensor:
    metadata = more[2] if len(more) > 2 else None
    return _view(storage, storage.dtype, offset, shape, stride, metadata)


def _tensor_v3(storage: Storage, offset: int, shape: Any, stride: Any, *more: Any) -> Tensor:
    return _view(storage, more[2].dtype, offset, shape, stride, more[3] if len(more) > 3 else None)


def _view(storage: Storage, dtype: Any, offset: Any, shape: Any, stride: Any, metadata: Any) -> Tensor:
    if metadata:
        raise Unreadable("a tensor has conjugate or negative bits; resolve them before saving")
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not is_known(dtype) or len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise Unreadable("a tensor's record makes no sense")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Unreadable("a tensor's record holds impossible sizes")
    size = itemsize(dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and (last + 1) * size > storage.numel * (itemsize(storage.dtype) if storage.dtype else 1):
        raise Unreadable("a tensor reaches past the end of its storage")
    if math.prod(shape) * size > max(MAX_EXPANDED, storage.numel * (itemsize(storage.dtype) if storage.dtype else 1)):
        raise Unreadable(f"an expanded tensor of {math.prod(shape) * size} bytes over a small storage")
    return Tensor(storage, dtype, offset, shape, stride)


def _typed_tensor(build: Callable[..., Any], kind: Any, args: Any, _state: Any) -> Any:
    if not (kind is Tensor or isinstance(kind, Named)) or build not in (_tensor_v2, _tensor_v3, _parameter):
        raise Refused("a tensor subclass")
    return build(*args)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _latin1(text: str, codec: str = "latin1") -> bytes:
    if codec not in ("latin1", "latin-1", "iso-8859-1") or type(text) is not str:
        raise Refused(f"_codecs.encode to {codec}")
    return text.encode("latin1")


def _reconstructor(kind: type, _base: Any, _state: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Inert)):
        raise Refused("copyreg._reconstructor of a class that is not listed")
    return kind()


def _text(name: str = "", *_: Any) -> str:
    return str(name)


def _items(_factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return dict(items)


_NUMPY: Final = {"_reconstruct": NumpyArray, "scalar": _scalar}
HANDLERS: Final[Mapping[str, Any]] = {
    "collections.OrderedDict": collections.OrderedDict, "collections.defaultdict": _items,
    "builtins.set": set, "builtins.frozenset": frozenset, "builtins.complex": complex, "_codecs.encode": _latin1,
    "builtins.list": list, "builtins.dict": dict, "builtins.object": object, "builtins.slice": slice,
    "builtins.int": Named("int"), "builtins.float": Named("float"), "builtins.bool": Named("bool"),
    "copyreg._reconstructor": _reconstructor,
    "torch.Size": tuple, "torch.device": _text, "torch.Tensor": Named("torch.Tensor"),
    "torch.nn.parameter.Parameter": Named("torch.nn.parameter.Parameter"),
    "torch._utils._rebuild_tensor": _tensor_v2, "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3, "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter, "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "torch.serialization._get_layout": _text,
    "torch.storage.UntypedStorage": Named("torch.UntypedStorage"), "torch.UntypedStorage": Named("torch.UntypedStorage"),
    "pathlib.PosixPath": lambda *parts: "/".join(map(str, parts)), "numpy.dtype": NumpyDtype,
    "pathlib._local.PosixPath": lambda *parts: "/".join(map(str, parts)), "numpy.ndarray": Named("numpy.ndarray"),
    **{f"torch.{name}": Named(f"torch.{name}", dtype) for name, dtype in _STORAGES.items()},
    **{f"numpy.{core}.multiarray.{name}": call for core in ("core", "_core") for name, call in _NUMPY.items()},
}  # fmt: skip
