"""Where a result comes from: commit, parameters, versions, hardware, time and memory."""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "nnsight", "polars", "datasets", "papermill", "dvc", "numpy", "safetensors")
PRODUCTS = ("dvc.lock", "data/results", "records", "benchmarks/*.csv", "scratch")
"""What the pipeline itself writes: being rewritten does not make a tree dirty."""


def commit(root: Path) -> tuple[str, bool]:
    """(commit, whether sources differ from it); ("no git", True) outside a repository."""
    exclude = [f":(exclude){path}" for path in (*PRODUCTS, "README.md")]  # into which `report` puts the claims
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head, bool(_git(root, "status", "--porcelain", "--", ".", *exclude))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "no git", True


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> str:
    """Processor, cores, memory and GPU in one line."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {_gpu()}"


def peak_memory_gib() -> float:
    """Largest resident set of any process that this one has waited for: after a run, that of its kernel."""
    unit = 1024 if sys.platform == "linux" else 1  # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


def describe(
    *,
    revision: tuple[str, bool],
    notebook: str,
    sections: list[str],
    parameters: Mapping[str, Any],
    seconds: float,
    outcome: str,
) -> str:
    """The provenance cell, in Markdown. `revision` is that of `commit`, `seconds` the wall time of the run."""
    head, dirty = revision
    rows = {
        "outcome": outcome,
        "notebook": f"`{notebook}`, sections {', '.join(f'`{s}`' for s in sections) or 'none'}",
        "commit": f"`{head}`" + (" with uncommitted changes" if dirty else ""),
        "seed": str(parameters.get("seed", "none")),
        "parameters": f"`{json.dumps(dict(parameters), sort_keys=True)}`",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "hardware": hardware(),
        "wall time": f"{seconds:.0f} s",
        "peak memory": f"{peak_memory_gib():.2f} GiB",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["**Provenance**", "", "| | |", "|---|---|", *lines])


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return ", ".join(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.splitlines())
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "no GPU"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()
