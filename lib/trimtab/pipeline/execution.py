"""Execute a notebook through papermill, in a kernel of this very environment, over unix sockets.

papermill records a dead kernel or a timeout as a success, and counts `sys.exit()` as one too. So the outcome is judged
here: a run has succeeded when every code cell was executed and none raised.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from trimtab.pipeline.terminal import Terminal


@dataclass
class Execution:
    """A notebook after its run, whole or cut short."""

    notebook: NotebookNode
    failure: str | None = None
    """One line: why it failed; None when every cell ran."""
    exit_code: int = 0
    current: int | None = None
    """Index of the cell being executed when the run ended."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT reached the runner. (asyncio lets only KeyboardInterrupt and SystemExit through.)"""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def execute(
    notebook: NotebookNode, parameters: dict[str, Any], terminal: Terminal, *, cwd: Path, cell_timeout: int | None
) -> Execution:
    """Run a parameterised copy of `notebook` to its end or its first failure. Never raises for what a cell does."""
    execution = Execution(notebook)
    _Engine.execution, _Engine.terminal = execution, terminal
    papermill_engines.register("trimtab", _Engine)
    try:
        with _signals(), _quiet_papermill():
            papermill.execute_notebook(
                notebook,
                None,
                parameters,
                engine_name="trimtab",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=cwd,
                execution_timeout=cell_timeout,
                autosave_cell_every=0,
            )
    except PapermillExecutionError as error:
        execution.failure, execution.exit_code = f"{error.ename}: {_first_line(error.evalue)}", 1
        remove_error_markers(execution.notebook)  # the record has marks of its own
    except CellTimeoutError:
        execution.failure, execution.exit_code = f"the cell took longer than its limit of {cell_timeout} s", 1
    except DeadKernelError:
        execution.failure, execution.exit_code = f"the kernel died ({_Engine.death})", 1
    except Interrupted as stop:
        execution.failure, execution.exit_code = f"stopped by {stop}", 128 + stop.number
    except Exception as error:  # a kernel that does not start, a broken message: still a failed record
        execution.failure, execution.exit_code = f"{type(error).__name__}: {_first_line(str(error))}", 1
    else:
        skipped = [cell for cell in execution.notebook.cells if not was_executed(cell)]
        if skipped:
            execution.failure, execution.exit_code = "the notebook ended early: a cell called exit()", 1
    return execution


def was_executed(cell: NotebookNode) -> bool:
    """Whether a cell ran; prose and empty cells count as run."""
    return cell.cell_type != "code" or not cell.source.strip() or cell.execution_count is not None


class _OwnKernel(KernelSpecManager):
    """`python3` is the running interpreter, whatever kernels the user has installed under that name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python", name=kernel_name)


class _KernelManager(AsyncKernelManager):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' are widgets, with random ids in a record
        # Large tensors come and go at every step: with huge pages that costs a fraction. glibc's; others ignore it.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        # A unix socket's path may hold 107 bytes: make a short one, whatever TMPDIR says.
        self.socket_folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp" if Path("/tmp").is_dir() else None))
        self.kernel_spec_manager = _OwnKernel()
        self.transport = "ipc"
        self.connection_file = str(self.socket_folder / "kernel.json")
        self.ip = str(self.socket_folder / "kernel-ipc")


class _Client(PapermillNotebookClient):
    execution: Execution
    terminal: Terminal

    def papermill_execute_cells(self) -> None:
        total = len(self.nb.cells)
        self.execution.notebook = self.nb
        for index, cell in enumerate(self.nb.cells):
            self.execution.current = index
            if cell.cell_type == "code":
                self.terminal.start_cell(index + 1, total, _headline(self.nb.cells, index))
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                return
        self.execution.current = None

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        if msg["msg_type"] == "stream":
            kept = self.terminal.text(msg["content"]["name"], msg["content"]["text"])
            if not kept:
                return None
            msg["content"]["text"] = kept
        elif msg["msg_type"] == "error":
            self.terminal.line("\n".join(msg["content"]["traceback"]), shown=False)
        return super().process_message(msg, cell, cell_index)


class _Engine(NBClientEngine):
    """papermill's engine with our client; what it learns goes into `execution`."""

    execution: Execution
    terminal: Terminal
    death: str = ""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, execution_timeout: int | None = None, start_timeout: int = 120, **_: Any
    ) -> None:
        manager = _KernelManager(kernel_name=kernel_name)
        client = _Client(nb_man, km=manager, timeout=execution_timeout, startup_timeout=start_timeout)
        client.execution, client.terminal = cls.execution, cls.terminal
        cls.execution.notebook = nb_man.nb
        try:
            client.execute()
        finally:
            process = getattr(manager.provisioner, "process", None)
            if process is not None:
                cls.death = _spell_exit(process.poll())
                with contextlib.suppress(ProcessLookupError):  # nothing may outlive the runner
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if client.kc is not None:
                client.kc.stop_channels()
            shutil.rmtree(manager.socket_folder, ignore_errors=True)


def _headline(cells: list[NotebookNode], index: int) -> str:
    """What a code cell is about: the nearest heading above it."""
    for cell in reversed(cells[:index]):
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("#"):
                    return line.lstrip("# ").strip()
    return "start"


def _spell_exit(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps for want of memory" if -code == signal.SIGKILL else name


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into Interrupted, once: a second one while cleaning up is ignored."""

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    """papermill warns about what we have checked already."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
