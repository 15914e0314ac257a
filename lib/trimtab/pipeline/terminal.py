"""What the terminal and the log see of a running notebook: one live line, and a full log without progress bars."""

import contextlib
import re
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.status import Status
from rich.text import Text

from trimtab.pipeline.bars import ANSI, settled, without_bars

LOG = "A log of `trimtab run`, which the next run of this record replaces.\n"
"""How a log begins, and nothing else does: a file without it is somebody's."""
QUIET_EVERY = 20.0
"""Seconds between progress lines where the terminal cannot redraw one (CI), and in the log."""
_DRAWING = re.compile(r"\|[^|]*\|\s*")


class Terminal:
    """Shows which cell runs and the last state of its progress bar; writes every other line to the log file."""

    def __init__(self, title: str, log: Path, stream: TextIO | None = None) -> None:
        self.title = title
        self.console = Console(file=stream or sys.stderr, highlight=False)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # an earlier log may be a link into the DVC cache: never write through it
        self.log = log.open("w", encoding="utf-8", errors="backslashreplace")
        self.log.write(LOG)
        self.status: Status | None = None
        self.cell = ""
        self._unfinished: dict[str, bool] = {}  # of each stream: whether its last line may go on in the next chunk
        self._last_quiet = time.monotonic()
        self._unheard = False

    def __enter__(self) -> "Terminal":
        if self.console.is_terminal:
            self.status = self.console.status(self.title)
            self.status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.status:
            self.status.stop()
        with contextlib.suppress(OSError):  # of a full disk `line` has told
            self.log.close()

    def start_cell(self, number: int, total: int, headline: str) -> None:
        """A cell begins; `headline` says what it is about."""
        self.cell = f"cell {number}/{total}"
        self._unfinished = {}
        self.line(f"[{self.cell}] {headline}", shown=False)
        self._show(headline)

    def text(self, name: str, text: str) -> str:
        """Take a chunk of a cell's stdout or stderr, and return what of it belongs in the record.

        Progress bars go to the live line and are dropped from the record: their rates differ from run to run. Where
        chunks are cut is a matter of timing: a carriage return at either end is kept, for `records` to join them.
        """
        unfinished = self._unfinished.get(name, False)
        kept, bars = without_bars(text, fresh=name == "stderr" and not unfinished)
        if bars:
            self.progress(ANSI.sub("", bars[-1]).strip())
        if name == "stderr" and not unfinished and not ANSI.sub("", kept).strip():
            return ""  # such as the line feed after a finished bar, which may come in a message of its own
        record = settled(kept)
        overwrites = unfinished and "\r" in kept.partition("\n")[0]
        record = ("\r" if overwrites else "") + record + ("\r" if kept.endswith("\r") else "")
        if record:
            self._unfinished[name] = not record.endswith("\n")
        if record.strip():
            self.line(record.strip("\r\n"), shown=False)
        return record

    def progress(self, bar: str) -> None:
        """Redraw the live line; where that is impossible, print it once in a while.

        The drawing between the bars is left out: tqdm fills the terminal with it, and step, time left and loss, which
        stand behind it, would be cut off.
        """
        bar = _DRAWING.sub(" ", bar)
        self._show(bar)
        if time.monotonic() - self._last_quiet > QUIET_EVERY:
            self._last_quiet = time.monotonic()
            self.line(f"[{self.cell}] {bar}", shown=not self.status)

    def line(self, text: str, *, shown: bool = True) -> None:
        """Write a line to the log, and to the terminal where `shown`."""
        try:
            self.log.write(f"{time.strftime('%H:%M:%S')} {ANSI.sub('', text)}\n")
            self.log.flush()
        except OSError as error:  # a run is worth more than its log
            if not self._unheard:
                self._print(f"the log ends here: {error.strerror}")
            self._unheard = True
        if shown:
            self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(f"{self.title}: {_encodable(text)}", markup=False, soft_wrap=True)

    def _show(self, text: str) -> None:
        if self.status:
            shown = f"{self.title} · {self.cell} · {_encodable(text)}"
            self.status.update(Text(shown[: self.console.width - 4]))


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which no file takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
