"""Progress bars in what a cell prints: tqdm's are told apart from everything else, in time linear in the text.

Their rates and times differ from run to run, so no record keeps them. A bar begins on a fresh line or behind a carriage
return, and is one only where all of it is as tqdm writes it; all else is a diagnostic, and stays.
"""

import re

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOUR = r"(?:\x1b\[[\d;]{0,16}m)?"
_CLOCK = r"-?(?:\d{1,9}:)?\d\d:\d\d"
_N = r"-?\d[\d.e+-]{0,24}[kMGTPEZY]?"
_RATE = r"(?:\?| ?-?\d{1,24}\.\d\d|-?\d(?:\.?\d){2,9}[kMGTPEZY]?)"
_UNIT = r"[^\[\]/\r\n]{0,40}?"
_PLAIN = r"[^\[\]\r\n]*+"
_NESTED = rf"{_PLAIN}(?:\[{_PLAIN}\]{_PLAIN})*+"
_END = rf"(?:, {_PLAIN}(?:\[{_NESTED}\]{_PLAIN})*+)?\]"
"""What was given as postfix, which may hold lists, and the bracket's end."""
_BAR = re.compile(
    rf"(?:[^\r\n]{{0,200}}?: )??(?: {{0,2}}\d{{1,9}}%(?:\|{_COLOUR}(?P<drawn>[^|\x1b\r\n]{{1,400}}+){_COLOUR}\|)?"
    rf" {_N}/{_N}(?: \[{_CLOCK}<(?:{_CLOCK}|\?), {_RATE}(?:{_UNIT}/s|s/{_UNIT}){_END}"
    # Cut short to a width that was given.
    rf"|(?(drawn)(?: \[[\d:?<-]{{0,24}}(?:, [^\[\]\r\n]{{0,400}})?| ?)(?:\x1b\[0m)?\Z|(?!)))"
    rf"|{_N}(?P<unit>{_UNIT}) \[{_CLOCK}, {_RATE}(?:(?P=unit)/s|s/(?P=unit)){_END})(?:\x1b\[0?m)?"
)
"""`loop:  34%|███▍  | 137/399 [00:34<01:06,  3.95token/s, loss=0.3]`, or where no total is known
`loop: 3chunk [00:01,  2.95chunk/s]`."""
_CLEARED = re.compile(r" ++\Z| *+(?=\x1b\[A)")
"""In place of a nested bar that is not left; how many blanks depends on its rate."""
_UP_AND_DOWN = re.compile(r"(?<!\n)(\n++)((?:\x1b\[A)++)")


def without_bars(text: str, *, fresh: bool = True) -> tuple[str, list[str]]:
    """(the text without tqdm's bars, the bars). `fresh`: whether a bar may begin a line, or only stand behind a
    carriage return."""
    if "%" not in text and "\r" not in text:
        return text, []
    bars: list[str] = []
    lines = []
    for line in re.sub(r"\r{2,}", "\r", text).split("\n"):
        kept = ""
        for number, segment in enumerate(line.split("\r")):
            if end := _end_of_bar(segment) if number or fresh else 0:
                bars.append(segment[:end])
                segment = segment[end:].lstrip(" ")
            cleared = _CLEARED.match(segment) if number else None
            if cleared:
                kept += segment[cleared.end() :]
            elif segment or not end:
                kept += f"\r{segment}" if number else segment
        lines.append(kept)
    return (_UP_AND_DOWN.sub(_level, "\n".join(lines)) if bars else "\n".join(lines)), bars


def settled(text: str) -> str:
    """What stays of lines that carriage returns overwrite: what was last written on each."""
    if "\r" not in text:
        return text
    lines = re.sub(r"\r{2,}", "\r", text).replace("\r\n", "\n").split("\n")
    return "\n".join(next(filter(None, reversed(line.split("\r"))), "") for line in lines)


def _end_of_bar(segment: str) -> int:
    """How many characters of a segment are a bar that it begins with; 0: none."""
    found = _BAR.match(segment) if "[" in segment or "%|" in segment else None
    # A drawing has a full, a partial and a blank character.
    return found.end() if found and len(set(found["drawn"] or "")) <= 3 else 0


def _level(moves: re.Match[str]) -> str:
    """Down by lines and up again, as nested bars are drawn: only what is left of it."""
    down, up = len(moves[1]), len(moves[2]) // len("\x1b[A")
    return "\n" * max(0, down - up) + "\x1b[A" * max(0, up - down)
