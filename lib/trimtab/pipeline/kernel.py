"""The kernel of a stage: this very interpreter, over unix sockets, untouched by the user's own start-up files.

Whatever happens to the runner, nothing outlives it: no kernel, no worker, no semaphore, no folder of sockets.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

OTHERS = (
    "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONBREAKPOINT", "PYTHONPROFILEIMPORTTIME",
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "POLARS_FMT_", "POLARS_TABLE_WIDTH", "TQDM_", "JPY_PARENT_PID",
)  # fmt: skip
"""Beginnings of names of a user's settings that would change what a notebook prints, or run code of the user's."""
START = (
    "import gc, runpy; gc.set_threshold(100_000, 50, 100); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)"
)
"""Starts a kernel. Imports make half a million objects and no garbage, and a fifth of their time went into looking for
some; `trimtab.pipeline.notebook.begin` sets Python's own thresholds again."""
TRACKER_SECONDS = 5.0
"""How long Python's resource tracker may take to remove the semaphores of workers that were killed."""


class _OwnKernel(KernelSpecManager):
    """`python3` is the running interpreter, whatever kernels the user has installed under that name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-c", START, "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", name=kernel_name)


class Manager(AsyncKernelManager):
    """Starts a kernel whose connection file, sockets and profile lie in a folder of their own, `folder`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # A unix socket's path may hold 107 bytes: make a short one, whatever TMPDIR says.
        self.folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp" if Path("/tmp").is_dir() else None))
        self._sweeper = _sweep_when_this_process_ends(self.folder)
        self.kernel_spec_manager = _OwnKernel()
        self.transport = "ipc"
        self.connection_file = str(self.folder / "kernel.json")
        self.ip = str(self.folder / "kernel-ipc")

    def environment(self) -> dict[str, str]:
        """The kernel's variables: this process's, less what is the user's own, and with all that would otherwise
        differ between two runs of one notebook set."""
        (self.folder / "matplotlibrc").write_text("svg.hashsalt: trimtab\n", encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        settings = {
            "IPYTHONDIR": str(self.folder / "ipython"),
            "MATPLOTLIBRC": str(self.folder / "matplotlibrc"),
            "PYTHONHASHSEED": "0",  # the order of sets
            "PYTHONUTF8": "1",  # whatever the locale
            "SOURCE_DATE_EPOCH": "315532800",  # the date inside a figure that is a text
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' are widgets, with random ids in a record
        }
        # Large tensors come and go at every step: with huge pages that costs a fraction. glibc's; others ignore it.
        return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | kept | settings

    def end(self) -> str:
        """Kill what is left of the kernel and its workers, and remove the folder. Says how the kernel ended."""
        process = getattr(self.provisioner, "process", None)
        death = ""
        if process is not None:
            death = _spell_exit(process.poll())
            _kill_group(process.pid)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert self._sweeper.stdin
        self._sweeper.stdin.close()
        self._sweeper.wait()
        return death


def end_with_dvc() -> None:
    """Where DVC runs this process as a stage, end (by SIGTERM) when DVC is killed: the stage would otherwise go on,
    unseen, beside the next `dvc repro`. Called from a terminal it does nothing."""
    if "DVC_STAGE" not in os.environ:
        return
    above: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            above.append(parent)
            if any(Path(word).name.startswith("dvc") for word in parent.cmdline()[:3]):
                break
        else:
            above = above[:1]

    def watch() -> None:
        while all(map(_lives, above)):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _sweep_when_this_process_ends(folder: Path) -> "subprocess.Popen[bytes]":
    """A shell that waits for the end of this process, also by SIGKILL, and then removes the folder."""
    command = ["/bin/sh", "-c", 'cat >/dev/null; sleep 1; rm -rf -- "$1"', "trimtab-sweeper", str(folder)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True, cwd="/"
    )


def _kill_group(number: int) -> None:
    """SIGKILL to all processes of a group; Python's resource tracker among them may first remove the semaphores and
    shared memory of those that were killed."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == number:
                members.append(process)
    trackers = []
    for process in members:
        with contextlib.suppress(psutil.Error):
            if "resource_tracker" in " ".join(process.cmdline()):
                trackers.append(process)
            else:
                process.kill()
    psutil.wait_procs(trackers, timeout=TRACKER_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def _spell_exit(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps for want of memory" if -code == signal.SIGKILL else name
