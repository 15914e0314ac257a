"""Execute a notebook through papermill, in a kernel of its own.

papermill records a dead kernel or a timeout as a success, and counts `sys.exit()` as one too. So the outcome is judged
here: a run has succeeded when every code cell was executed and none raised.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from trimtab.pipeline.kernel import Manager
from trimtab.pipeline.terminal import Terminal

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SKIPPED = "skip-execution"
"""Tag of a cell that papermill leaves out."""


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
    """SIGTERM, SIGINT or SIGHUP reached the runner. (asyncio lets only KeyboardInterrupt and SystemExit through.)"""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def execute(
    notebook: NotebookNode,
    parameters: dict[str, Any],
    terminal: Terminal,
    *,
    cwd: Path,
    cell_timeout: int | None,
    variables: Mapping[str, str] | None = None,
) -> Execution:
    """Run a parameterised copy of `notebook` to its end or its first failure. Never raises for what a cell does, nor,
    within `signals`, for a signal. `variables`: further ones of the kernel's environment."""
    execution = Execution(notebook)
    _Engine.execution, _Engine.terminal, _Engine.variables = execution, terminal, variables or {}
    papermill_engines.register("trimtab", _Engine)
    try:
        with _quiet_papermill():
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
        remove_error_markers(execution.notebook)  # the record has marks of its own
        told = error.evalue.strip() or _last_words(execution)  # of an unknown magic IPython tells on stderr alone
        execution.failure, execution.exit_code = f"{error.ename}: {_first_line(told)}", 1
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
    """Whether a cell ran; prose, empty cells and those that papermill is told to skip count as run."""
    nothing = cell.cell_type != "code" or not cell.source.strip() or SKIPPED in cell.metadata.get("tags", [])
    return nothing or cell.execution_count is not None


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
    variables: Mapping[str, str]
    death: str = ""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, execution_timeout: int | None = None, start_timeout: int = 120, **_: Any
    ) -> None:
        manager = Manager(kernel_name=kernel_name)
        client = _Client(nb_man, km=manager, timeout=execution_timeout, startup_timeout=start_timeout)
        client.execution, client.terminal = cls.execution, cls.terminal
        cls.execution.notebook = nb_man.nb
        try:
            client.execute(env={**manager.environment(), **cls.variables})
        finally:
            cls.death = manager.end()
            if client.kc is not None:
                client.kc.stop_channels()


def _headline(cells: list[NotebookNode], index: int) -> str:
    """What a code cell is about: the nearest heading above it."""
    for cell in reversed(cells[:index]):
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("#"):
                    return line.lstrip("# ").strip()
    return "start"


def _last_words(execution: Execution) -> str:
    """The last line that the current cell wrote to stderr."""
    if execution.current is None:
        return ""
    written = [
        o.text for o in execution.notebook.cells[execution.current].get("outputs", []) if o.get("name") == "stderr"
    ]
    return "".join(written).strip().rpartition("\n")[2]


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGHUP into Interrupted, once: a second one while cleaning up is ignored. A signal that
    is ignored already, as SIGHUP is under nohup, stays so."""

    def stop(number: int, frame: object) -> None:
        for each in STOPS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in STOPS}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


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
