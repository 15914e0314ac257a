"""What a result belongs to, by contents: the data, the model, the configuration, the code, and the machine.

`identify` is the one function that makes an identity: named parts, each a small readable value or a digest. Progress is
taken up where all parts are equal. Where one differs, `tell` says which, and the progress of the other run is kept.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from trimtab import code
from trimtab.errors import InputError
from trimtab.files import fingerprint, tree_sha256

READABLE = 64
"""Characters of a value up to which a part is the value itself and not its digest."""
SHOWN = 4
"""Parts that are named where two identities differ."""
COMPUTING = ("numba", "numpy", "torch", "transformers")
"""Packages whose version may change the bits of a result."""
Identity = dict[str, Any]
"""Parts by name."""


def identify(*given: Any, **parts: Any) -> Identity:
    """Named parts from configurations, paths (what the file or folder holds), tensors, modules (weights and
    configuration), data frames, numbers, text, functions (their code), and containers of these.

    The fields of dataclasses and the entries of small mappings become parts of their own. What is given without a name
    is named `identity` unless it has names itself. Raises InputError for an object whose contents are unknown here, and
    for a missing file.
    """
    found: Identity = {}
    for number, value in enumerate(given):
        named = _entries(value) is not None
        _add(found, "" if named else f"identity{number or ''}", value)
    for name, value in parts.items():
        _add(found, name, value)
    return dict(sorted(found.items()))


def machine(device: str | torch.device = "cpu") -> Identity:
    """What else decides the bits: threads, the kind of processor, versions of the packages that compute."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": f"{kind} {name}", "threads": torch.get_num_threads(), **_versions()}


def digest(value: Any) -> str:
    """Sixteen hex digits of a value's contents, of whatever kind `identify` knows: of an identity, say."""
    return hashlib.sha256(json.dumps(_content(value)).encode()).hexdigest()[:16]


def difference(there: Identity, here: Identity) -> str:
    """What differs between two identities, as in `threads 2 there, 1 here; text`."""
    names = [name for name in sorted(there.keys() | here) if _text(there, name) != _text(here, name)]
    told = [_told(name, there, here) for name in names[:SHOWN]]
    return "; ".join(told) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def tell(path: Path, there: Identity, here: Identity) -> None:
    """Say on stderr, in one line, that what lies at a path is of another run, and in what the two differ."""
    print(f"{path} is of another run ({difference(there, here)}): it is kept, and not used here.", file=sys.stderr)


def _text(identity: Identity, name: str) -> str:
    return json.dumps(identity[name]) if name in identity else ""


def _told(name: str, *both: Identity) -> str:
    values = [str(identity.get(name, "absent")) for identity in both]
    if any(value.startswith("sha256:") or len(value) > READABLE for value in values):
        return name
    told = [value if value.isprintable() else ascii(value) for value in values]
    return f"{name} {told[0]} there, {told[1]} here"


def _add(found: Identity, name: str, value: Any) -> None:
    entries = _entries(value)
    if entries is None:
        while name in found:  # of two that are called the same, both count
            name = f"{name}'"
        found[name] = _part(value)
    for key, item in (entries or {}).items():
        _add(found, f"{name}.{key}" if name else key, item)


def _entries(value: Any) -> Mapping[str, Any] | None:
    """Entries that become parts of their own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping) and 0 < len(value) <= READABLE and all(isinstance(key, str) for key in value):
        return value
    return None


def _part(value: Any) -> Any:
    content = digest(value)  # before anything else: it refuses what has no contents
    plain = list(value) if isinstance(value, list | tuple) else value
    scalars = plain if isinstance(plain, list) else [plain]
    small = all(item is None or isinstance(item, bool | int | str) or _is_finite(item) for item in scalars)
    if small and len(text := json.dumps(plain)) <= READABLE:
        return json.loads(text)
    return f"sha256:{content}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _content(value: Any) -> Any:
    """Contents as JSON that tells values of different types apart."""
    if value is None or isinstance(value, bool | int | str):
        return value
    value = list(value) if isinstance(value, tuple) else value
    for kind, content in CONTENTS.items():
        if isinstance(value, kind):
            return [kind.__name__, *content(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, _content(_entries(value))]
    if isinstance(value, partial):
        return ["partial", *map(_content, (value.func, value.args, value.keywords))]
    if inspect.isroutine(value) or isinstance(value, type):
        return ["code", code.name_of(value), code.of(value)]
    raise InputError(
        f"identity: the contents of a {type(value).__qualname__} are unknown: give numbers, text, tensors, data "
        "frames, configurations or paths that say what it holds."
    )


def _bytes(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _frame(frame: pl.DataFrame) -> list[Any]:
    written = BytesIO()
    frame.rechunk().write_ipc(written, compression="uncompressed", compat_level=pl.CompatLevel.oldest())
    return [str(frame.schema), hashlib.sha256(written.getbuffer()).hexdigest()]


def _module(module: nn.Module) -> list[Any]:
    config: Any = getattr(module, "config", None)  # of Hugging Face models
    config = config if hasattr(config, "to_dict") else None
    attention, entries = getattr(config, "_attn_implementation", None), config.to_dict() if config else {}
    told = {name: value for name, value in entries.items() if name not in ("_name_or_path", "transformers_version")}
    return [type(module).__qualname__, attention, fingerprint(told), _content(dict(module.state_dict()))]


CONTENTS: Mapping[type, Callable[[Any], list[Any]]] = {
    float: lambda value: [repr(float(value))],
    bytes: lambda value: [hashlib.sha256(value).hexdigest()],
    Path: lambda value: [tree_sha256(value)],
    Tensor: lambda value: [str(value.dtype), list(value.shape), _bytes(value)],
    np.ndarray: lambda value: [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()],
    np.generic: lambda value: [str(value.dtype), repr(value.item())],
    nn.Module: _module,
    pl.DataFrame: _frame,
    pl.Series: lambda value: _frame(value.to_frame()),
    torch.dtype: lambda value: [str(value)],
    torch.device: lambda value: [str(value)],
    Mapping: lambda value: sorted(([_content(k), _content(v)] for k, v in value.items()), key=json.dumps),
    list: lambda value: [_content(item) for item in value],
    range: lambda value: [value.start, value.stop, value.step],
    AbstractSet: lambda value: sorted((_content(item) for item in value), key=json.dumps),
    ModuleType: lambda value: list(code.module_digests(Path(str(value.__file__))).items()),
}
"""What tells two values of a kind apart, for every kind that has contents."""


@cache
def _versions() -> Identity:
    return {name: version(name) for name in COMPUTING}
