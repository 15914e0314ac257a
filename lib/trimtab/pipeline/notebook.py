"""What a stage's notebook calls: the same from JupyterLab and from the pipeline."""

import dataclasses
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from IPython.display import Markdown, display

from trimtab.claims import Verdict, verdict_table
from trimtab.errors import InputError
from trimtab.files import fingerprint, remove, write_json
from trimtab.pipeline.root import project_root

Config = TypeVar("Config")


def begin(namespace: Mapping[str, Any]) -> "Stage":
    """Call first, with `globals()`: go to the repository's root, fix seeds and threads, choose the device.

    Reads `seed`, `threads` and `device` (cpu | cuda | auto) of the parameters cell.
    """
    os.chdir(project_root())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    seed, wanted = int(namespace["seed"]), namespace["device"]
    torch.set_num_threads(int(namespace["threads"]))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries that still use the global generator)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a tenth of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted not in ("cpu", "cuda", "auto"):
        raise InputError(f"base: device must be cpu, cuda or auto, not {wanted!r}.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("base: device is cuda, but torch sees no GPU here: set it to auto or cpu.")
    device = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    return Stage(namespace, device, seed)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A notebook in progress, with the variables of its parameters cell."""

    namespace: Mapping[str, Any]
    device: str
    """cpu or cuda."""
    seed: int
    locks: list[FileLock] = dataclasses.field(default_factory=list)

    def configure(self, kind: type[Config]) -> Config:
        """Build a configuration dataclass from the parameters that bear its fields' names (lists become tuples)."""
        fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        missing = [name for name in fields if name not in self.namespace]
        if missing:
            raise InputError(f"The parameters cell lacks `{missing[0]}`, a field of {kind.__name__}.")
        values = {name: self.namespace[name] for name in fields}
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def resume_folder(self, *identity: Any) -> Path:
        """A scratch folder that survives a killed run of the same work, and is found again by the next.

        Work is the same when `identity` (configuration, digests of inputs) and the library's sources are.
        """
        library = Path(__file__).parents[1]
        sources = {str(p.relative_to(library)): p.read_text() for p in sorted(library.rglob("*.py"))}
        folder = Path("scratch/resume") / fingerprint([identity, sources])[:16]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", is_singleton=True)  # a cell that is run again takes its own lock again
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another run of the same work: wait for it, or stop it.") from None
        self.locks.append(lock)  # held until the process ends, however it ends
        return folder

    def finish(
        self,
        results: str,
        metrics: Mapping[str, Any],
        verdicts: Sequence[Verdict] = (),
        *,
        discard: Sequence[Path] = (),
    ) -> None:
        """Write the stage's results (metrics and verdicts) as JSON, show the verdicts, drop resume folders."""
        content = {"metrics": _rounded(metrics), "claims": [_rounded(dataclasses.asdict(v)) for v in verdicts]}
        write_json(Path(results), content)
        for folder in discard:
            remove(folder)
        if verdicts:
            display(Markdown(verdict_table(verdicts)))


def _rounded(value: Any) -> Any:
    """Six significant digits: enough for every claim, and quiet in a diff."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
