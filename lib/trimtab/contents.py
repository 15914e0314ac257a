"""Values as digests of what they hold, the same in every process: no addresses, no order of hashes."""

import copyreg
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import cached_property, partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from trimtab import code
from trimtab.errors import InputError
from trimtab.files import tree_sha256

NO_CONTENTS = {"_name_or_path", "name_or_path", "transformers_version", "generation_config", "warnings_issued"}
"""Attributes of models of Hugging Face, and of their configurations, that do not enter what they compute."""
BASE = vars(nn.Module()).keys()
"""Attributes of every module."""


class Contents:
    """Reads values one within another. `strict`: paths are what the file or folder holds, and what has no contents is
    refused with InputError; else paths are text, and of what has no contents the type counts."""

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.above: list[Any] = []
        self.seen: dict[int, tuple[Any, Any]] = {}

    def digest(self, value: Any) -> str:
        """Sixteen hex digits. Raises InputError, in one sentence, for what cannot be read."""
        try:
            return _sha256(self(value))[:16]
        except RecursionError:
            reason = "is nested too deeply"
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, OSError, pl.exceptions.PolarsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            reason = f"cannot be read ({ascii(first)[1:-1]})"
        raise InputError(f"identity: a {type(value).__qualname__} {reason}: give what it holds as numbers or text.")

    def __call__(self, value: Any) -> Any:
        """What JSON tells apart wherever values differ in what they hold."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return ["float", repr(value)]
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        for up, each in enumerate(reversed(self.above)):
            if each is value:
                return ["above", up]
        self.above.append(value)
        try:
            content = ["#", _sha256(self._read(value))]
        finally:
            self.above.pop()
        self.seen[id(value)] = value, content
        return content

    def _read(self, value: Any) -> list[Any]:
        if isinstance(value, tuple):
            if hasattr(value, "_fields"):
                return ["fields", type(value).__qualname__, self(dict(zip(value._fields, value, strict=True)))]
            value = list(value)
        for kind, content in self.KINDS.items():
            if isinstance(value, kind):
                return [kind.__name__, *content(self, value)]
        kind = type(value)
        if (fields := fields_of(value)) is not None:
            return ["fields", self(kind) if callable(value) else kind.__qualname__, self(dict(fields))]
        for name in ("__wrapped__", "py_func"):  # of a cache, of numba
            if isinstance(inner := getattr(value, name, None), FunctionType):
                return ["wrapped", kind.__qualname__, self(inner)]
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):  # a configuration of Hugging Face
            told = {name: each for name, each in value.to_dict().items() if name not in NO_CONTENTS}
            return ["config", kind.__qualname__, getattr(value, "_attn_implementation", None), self(told)]
        try:
            if kind is object or isinstance(value, Iterator) or _is_foreign(kind.__module__):
                raise TypeError
            reduced = copyreg.dispatch_table.get(kind, lambda each: each.__reduce_ex__(4))(value)
        except Exception:
            if self.strict:
                raise InputError(
                    f"identity: the contents of a {kind.__qualname__} are unknown: give numbers, text, tensors, data "
                    "frames, configurations or paths that say what it holds."
                ) from None
            return ["unknown", kind.__qualname__]
        pieces = [reduced] if isinstance(reduced, str) else reduced
        return ["object", self(kind), *(self(list(each) if isinstance(each, Iterator) else each) for each in pieces)]

    def path(self, path: Path) -> list[Any]:
        """What lies there, or its text."""
        return [tree_sha256(path) if self.strict else str(path)]

    def tensor(self, tensor: Tensor) -> list[Any]:
        """Layouts and strides do not count, but for what a sparse tensor leaves out."""
        tensor, about = tensor.detach(), [str(tensor.dtype), list(tensor.shape), str(tensor.layout)]
        if tensor.is_meta:
            raise InputError("identity: a meta tensor holds no values: load it to a device first.")
        if tensor.is_quantized:
            channels = "channel" in str(tensor.qscheme())
            step = ["q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"] if channels else []
            step = step or ["q_scale", "q_zero_point"]
            return [*about, str(tensor.qscheme()), *(self(getattr(tensor, name)()) for name in step),
                    self(tensor.int_repr())]  # fmt: skip
        if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return [*about, self(tensor.to_dense())]
        if tensor.layout is not torch.strided:
            sparse = tensor.to_sparse_coo().coalesce()
            return [*about, self(sparse.indices()), self(sparse.values())]
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return [*about, hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()]

    def array(self, array: np.ndarray) -> list[Any]:
        """An array's type, shape and values."""
        if isinstance(array, np.ma.MaskedArray):
            return [self(np.ma.getmaskarray(array)), self(array.filled())]
        values = self(array.tolist()) if array.dtype.hasobject else hashlib.sha256(array.tobytes()).hexdigest()
        return [str(array.dtype), list(array.shape), values]

    def series(self, series: pl.Series) -> list[Any]:
        """Nulls apart from values: whatever lies under a null does not count."""
        written, values = BytesIO(), pl.DataFrame({"": series.drop_nulls().rechunk()})
        values.write_ipc(written, compression="uncompressed", compat_level=pl.CompatLevel.oldest())
        here = np.packbits(series.is_null().to_numpy()).tobytes()
        return [
            series.name,
            str(series.dtype),
            len(series),
            self(here),
            hashlib.sha256(written.getbuffer()).hexdigest(),
        ]

    def module(self, module: nn.Module) -> list[Any]:
        """A module's type, mode, settings, hooks, tensors (those that are not saved too) and inner modules."""
        own = vars(module)
        hooks = {name: list(each.values()) for name, each in own.items() if name in BASE and "hooks" in name and each}
        settings = {name: each for name, each in own.items() if name not in BASE | NO_CONTENTS}
        held = [own[name] for name in ("_parameters", "_buffers", "_modules")]
        strict, self.strict = self.strict, False
        try:
            about = [self(type(module)), module.extra_repr(), module.training, self(hooks), self(settings)]
        finally:
            self.strict = strict
        return [*about, *(self(list(each.items())) for each in held)]

    def function(self, function: FunctionType) -> list[Any]:
        """Its code and all that it was made with; of one that no file holds, the global values it names too."""
        if "__wrapped__" in vars(function) and _is_foreign(function.__globals__.get("__name__", "")):
            return ["wrapped", self(function.__wrapped__)]  # type: ignore[attr-defined]  # its module's text names the wrapper
        made = [function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function)]
        content = [code.of(function), *map(self, made)]
        if not code.in_file(function):
            names = {name: function.__globals__[name] for name in _names(function.__code__, function.__globals__)}
            strict, self.strict = self.strict, False
            try:
                content.append(self(names))
            finally:
                self.strict = strict
        return content

    def cell(self, cell: CellType) -> list[Any]:
        """A variable of a closure, which may have no value yet."""
        try:
            held = cell.cell_contents
        except ValueError:
            return []
        return [self(held)]

    def kind(self, kind: type) -> list[Any]:
        """A class: the code of it and its bases; of one that a function has made, what that gave it."""
        given = {}
        if "<locals>" in kind.__qualname__:
            plain = (bool, int, float, str, tuple, FunctionType)
            given = {name: each for name, each in vars(kind).items() if isinstance(each, plain)}
            given = {
                name: each for name, each in given.items() if name[:2] != "__" or getattr(each, "__closure__", None)
            }
        return [code.of(kind), self(given), *map(self, kind.__bases__)]

    def builtin(self, function: BuiltinFunctionType) -> list[Any]:
        """Of a method, its owner too."""
        owner = function.__self__
        return [function.__module__, function.__qualname__, None if isinstance(owner, ModuleType) else self(owner)]

    KINDS: ClassVar[Mapping[type, Callable[["Contents", Any], list[Any]]]] = {
        Enum: lambda self, value: [type(value).__qualname__, value.name, self(value.value)],
        float: lambda self, value: [repr(float(value))],
        bytes: lambda self, value: [hashlib.sha256(value).hexdigest()],
        Path: path,
        Tensor: tensor,
        np.ndarray: array,
        np.generic: lambda self, value: [str(value.dtype), repr(value.item())],
        nn.Module: module,
        pl.DataFrame: lambda self, value: [value.height, *map(self, value.get_columns())],
        pl.Series: series,
        torch.dtype: lambda self, value: [str(value)],
        torch.device: lambda self, value: [str(value)],
        Mapping: lambda self, value: sorted(([self(k), self(v)] for k, v in value.items()), key=json.dumps),
        list: lambda self, value: list(map(self, value)),
        range: lambda self, value: [value.start, value.stop, value.step],
        AbstractSet: lambda self, value: sorted(map(self, value), key=json.dumps),
        ModuleType: lambda self, value: [value.__name__, code.of_module(value)],
        partial: lambda self, value: list(map(self, (value.func, value.args, value.keywords))),
        FunctionType: function,
        MethodType: lambda self, value: [self(value.__func__), self(value.__self__)],
        BuiltinFunctionType: builtin,
        CellType: cell,
        type: kind,
    }
    """What tells two values of a kind apart."""


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """A dataclass's fields; of an object that has a property `identity`, what that says it holds."""
    if isinstance(value, tuple(Contents.KINDS)):
        return None
    if isinstance(getattr(type(value), "identity", None), property | cached_property):
        return {"identity": value.identity}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


def _is_foreign(module: str) -> bool:
    """Whether a module is of a package that we know nothing about: what it makes may hold caches, counters and
    addresses."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return "site-packages" in file.parts and module.partition(".")[0] not in ("numpy", "torch", "trimtab")


def _names(program: CodeType, known: Mapping[str, Any]) -> list[str]:
    """Global names of a program and those inside it."""
    inner = [_names(each, known) for each in program.co_consts if isinstance(each, CodeType)]
    return sorted({*(name for name in program.co_names if name in known), *chain(*inner)})


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
