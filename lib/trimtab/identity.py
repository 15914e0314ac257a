"""What a result belongs to, by contents: the data, the model, the configuration, the code, and the machine.

`identify` is the one function that makes an identity: named parts, each a small readable value or a digest. Progress is
taken up where all parts are equal. Where one differs, `tell` says which, and the progress of the other run is kept.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trimtab.contents import Contents, fields_of

READABLE = 64
"""Characters of a value up to which a part is the value itself and not its digest."""
SHOWN = 4
"""Parts that are named where two identities differ."""
COMPUTING = ("numba", "numpy", "torch", "transformers")
"""Packages whose version may change the bits of a result."""


class Identity(dict[str, Any]):
    """Parts by name."""


def identify(*given: Any, **parts: Any) -> Identity:
    """Named parts from configurations, paths (what the file or folder holds), tensors, modules (weights, types and
    settings), data frames, numbers, text, functions (their code, and what they were bound to), objects of our own and
    of Python's that can be pickled, and containers of these.

    The fields of dataclasses and the entries of small mappings become parts of their own: `a.b` is the entry b of a,
    `a\\.b` an entry of that name. What is given without a name is named `identity` unless it has names itself. Raises
    InputError for an object whose contents are unknown here, and for a missing file.
    """
    found = Identity()
    for number, value in enumerate(given):
        _add(found, None if _entries(value) is not None else f"identity{number or ''}", value)
    for name, value in parts.items():
        _add(found, _escaped(name), value)
    return Identity(sorted(found.items()))


def behaviour(function: Any) -> Identity:
    """Parts that say what a function computes: its code, and its defaults, closure, owner and the arguments of a
    partial. What lies at a path held there is for the caller to tell, and the path counts as text; of what has no
    contents the type counts."""
    found, values = Identity(), dict[str, Any]()
    if isinstance(function, partial):
        values = {f"argument {i}": value for i, value in enumerate(function.args)} | function.keywords
        function = function.func
    for name, value in values.items():
        _add(found, _escaped(name), value, strict=False)
    found["function"] = getattr(function, "__qualname__", type(function).__qualname__)
    found["function code"] = f"sha256:{digest(function, strict=False)}"
    return found


def machine(device: str | torch.device = "cpu") -> Identity:
    """What else decides the bits: threads, the kind of processor, versions of the packages that compute."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    return Identity({"device": f"{kind} {name}", "threads": torch.get_num_threads(), **_versions()})


def digest(value: Any, *, strict: bool = True) -> str:
    """Sixteen hex digits of a value's contents, of whatever kind `identify` knows: of an identity, say. `strict`: raise
    InputError for what has no contents."""
    return Contents(strict).digest(value)


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two identities, as in `threads 2 there, 1 here; text`."""
    names = [name for name in sorted({*there, *here}) if _text(there, name) != _text(here, name)]
    told = [_told(name, there, here) for name in names[:SHOWN]]
    return "; ".join(told) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def tell(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Say on stderr, in one line, that what lies at a path is of another run, and in what the two differ."""
    line = f"{path} is of another run ({difference(there, here)}): it is kept, and not used here."
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)


def _text(identity: Mapping[str, Any], name: str) -> str:
    return json.dumps(identity[name], ensure_ascii=False) if name in identity else ""


def _told(name: str, *both: Mapping[str, Any]) -> str:
    values = [str(identity.get(name, "absent")) for identity in both]
    name = name if name.isprintable() else ascii(name)
    if any(value.startswith("sha256:") or len(value) > READABLE for value in values):
        return name
    told = [value if value.isprintable() else ascii(value) for value in values]
    return f"{name} {told[0]} there, {told[1]} here"


def _add(found: Identity, name: str | None, value: Any, above: tuple[Any, ...] = (), strict: bool = True) -> None:
    entries = None if any(value is each for each in above) else _entries(value)
    kind = None if entries is None or isinstance(value, Mapping) else type(value).__qualname__
    if entries is None or kind:
        part = _part(value, strict) if entries is None else kind
        key = "identity" if name is None else name
        while key in found:  # of two that are called the same, both count
            key = f"{key}'"
        found[key] = part
    for key, item in (entries or {}).items():
        key = key if isinstance(value, Identity) else _escaped(key)
        _add(found, key if name is None else f"{name}.{key}", item, (*above, value), strict)


def _escaped(name: str) -> str:
    return re.sub(r"[.'\\]", r"\\\g<0>", name)


def _entries(value: Any) -> Mapping[str, Any] | None:
    """Entries that become parts of their own."""
    if not isinstance(value, Mapping):
        return fields_of(value)
    small = 0 < len(value) <= READABLE and all(type(key) is str for key in value)
    return value if small or (value and isinstance(value, Identity)) else None


def _part(value: Any, strict: bool) -> Any:
    content = digest(value, strict=strict)  # before anything else: it refuses what has no contents
    plain = list(value) if type(value) in (list, tuple) else value
    scalars = plain if isinstance(plain, list) else [plain]
    small = all(item is None or type(item) in (bool, int, str) or _is_finite(item) for item in scalars)
    if small and len(text := json.dumps(plain, ensure_ascii=False)) <= READABLE:
        return json.loads(text)
    return f"sha256:{content}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in COMPUTING}
