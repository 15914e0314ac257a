"""What a stage's notebook calls: the same from JupyterLab and from the pipeline."""

import dataclasses
import gc
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from IPython.display import Markdown, display

from trimtab import code
from trimtab.claims import Verdict, verdict_table
from trimtab.errors import InputError
from trimtab.files import read_json, remove, write_json
from trimtab.identity import digest, identify, machine, tell
from trimtab.pipeline.base import BaseConfig
from trimtab.pipeline.results import PROGRESS, is_results, plain
from trimtab.pipeline.root import project_root
from trimtab.validation import made_of

Config = TypeVar("Config")
IDENTITY = "identity.json"
"""File of a resume folder that says whose progress it holds."""


def begin(namespace: Mapping[str, Any]) -> "Stage":
    """Call first, with `globals()`: go to the repository's root, fix seeds and threads, choose the device.

    Reads `seed`, `threads` and `device` (cpu | cuda | auto) of the parameters cell; see `BaseConfig`.
    """
    os.chdir(project_root())
    gc.freeze()  # what was imported stays: nothing in it is looked through again for garbage
    gc.set_threshold(700, 10, 10)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    seed, threads, wanted = int(namespace["seed"]), int(namespace["threads"]), namespace["device"]
    BaseConfig(namespace.get("scale", "by hand"), seed, wanted, threads)
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries that still use the global generator)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a tenth of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("`device` is cuda, but torch sees no GPU here: set it to auto or cpu in section `base`.")
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
    folders: list[Path] = dataclasses.field(default_factory=list)
    """Where this run keeps its progress."""

    def configure(self, kind: type[Config]) -> Config:
        """Build a configuration dataclass from the parameters that bear its fields' names (lists become tuples)."""
        fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        missing = [name for name in fields if name not in self.namespace]
        if missing:
            raise InputError(f"The parameters cell lacks `{missing[0]}`, a field of {kind.__name__}.")
        return made_of(kind, self.namespace)

    def resume_folder(self, *identity: Any, **parts: Any) -> Path:
        """A scratch folder that survives a killed run of the same work, and is found again by the next.

        Work is the same when its identity is: `identity` and `parts` (configuration, contents of inputs, as
        `identity.identify` takes them), the seed, the code that this notebook imports, and the machine. Folders of the
        same stage and other work are kept, and told of.
        """
        found = identify(*identity, **parts, seed=self.seed, **machine(self.device))
        found |= {f"code of {name}": f"sha256:{mark}" for name, mark in code.behind(self.namespace, Path.cwd()).items()}
        root, slug = Path("scratch/resume"), self._slug()
        folder = root / f"{slug}-{digest(found)}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", is_singleton=True)  # a cell that is run again takes its own lock again
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another run of the same work: wait for it, or stop it.") from None
        self.locks.append(lock)  # held until the process ends, however it ends
        if not (folder / IDENTITY).is_file():
            others = [path for path in root.glob(f"{slug}-*/{IDENTITY}") if len(path.parent.name) == len(folder.name)]
            if others:
                latest = max(others, key=lambda path: path.stat().st_mtime)
                tell(latest.parent, read_json(latest), found)
            write_json(folder / IDENTITY, found)
        self.folders.append(folder)
        if PROGRESS in os.environ:
            with Path(os.environ[PROGRESS]).open("a", encoding="utf-8") as file:
                file.write(f"{folder.resolve()}\n")
        return folder

    def _slug(self) -> str:
        """The stage's name as its results file has it, fit for a file name."""
        path = Path(str(self.namespace.get("results", "stage")))
        parts = [part for part in (*path.parent.parts, path.stem) if part not in ("data", "scratch", "results")]
        return re.sub(r"[^\w.-]+", "_", "-".join(parts[-2:])) or "stage"

    def finish(self, results: str, metrics: Mapping[str, Any], verdicts: Sequence[Verdict] = ()) -> None:
        """Write the stage's results (metrics and verdicts) as JSON, and show the verdicts. By hand, where no runner
        waits for record and outputs to be safe, the folders of progress are dropped as well.

        Arrays, tensors and paths become plain JSON. NaN and infinity become null, which the cell tells by name. Raises
        InputError naming the metric for what is no result, and where `results` is a file of something else.
        """
        unbounded: list[str] = []
        content = {"metrics": plain(metrics, "metrics", unbounded), "claims": plain(list(verdicts), "claims", [])}
        write_json(Path(results), content, own=is_results)
        if unbounded:
            print(f"Not finite, and written as null: {', '.join(unbounded)}.")
        if verdicts:
            display(Markdown(verdict_table(verdicts)))
        if PROGRESS not in os.environ:
            for folder in self.folders:
                remove(folder)
