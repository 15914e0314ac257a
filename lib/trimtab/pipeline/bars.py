"""Progress bars in what a cell prints: tqdm's are told apart from everything else, in time linear in the text.

Their rates and times differ from run to run, so no record keeps them. What tqdm draws always begins on a fresh line or
behind a carriage return, and ends with a bracket that holds a clock and a rate; all else is a diagnostic, and stays.
"""

import re

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CLOCK = r"-?(?:\d{1,9}:)?\d\d:\d\d"
_RATE = r" {0,12}(?:\?|-?\d[\d.]{0,15})[^\[\],\r\n]{0,40}?/[^\[\],\r\n]{1,40}(?=[\],]|\Z)"
_OF_TOTAL = re.compile(rf"(?P<before>[|%]) [^\s/|]{{1,24}}/[^\s/|]{{1,24}} \[{_CLOCK}<(?:{_CLOCK}|\?),{_RATE}")
"""`| 137/399 [00:34<01:06, 3950.47token/s`, as it stands behind the drawing, or the per cent where nothing is drawn."""
_OF_COUNT = re.compile(rf" \[{_CLOCK},{_RATE}")
"""` [00:01, 2.95chunk/s`, where no total is known."""
_COUNT = re.compile(r"(?:\A|: )\d[\d.]{0,20}\D?[^\[\]]{0,40}\Z")
_CUT = re.compile(
    r"(?:[^|]{0,200}: )?(?:"
    r"[ ]{0,2}\d{1,9}%\|[^|]{1,400}(?:\|[ ]?[\d.?kMGT]{0,24}(?:/[\d.?kMGT]{0,24}(?:[ ](?:\[[\d:]{0,12}(?:<[\d:?]{0,12}"
    r"(?:,[^\]]{0,80})?)?)?)?)?)?"
    r"|\d[\d.]{0,20}[^\d\[\]][^\[\]]{0,40}[ ]\[[\d:]{0,12}(?:,[ ]{0,8}(?:[\d.?]{1,16}[ ]?[^\s,\]]{0,40})?)?"
    r")\Z"
)
"""A bar whose end did not fit into the width that was asked for."""
_RESET = re.compile(r"(?:\x1b\[0?m)?")
_CLEARED = re.compile(r" ++\Z| *+(?=\x1b\[A)")
"""In place of a nested bar that is not left; how many blanks depends on its rate."""
_UP_AND_DOWN = re.compile(r"(?<!\n)(\n++)((?:\x1b\[A)++)")
_LONGEST = 4_000
"""Characters of a drawing, and of what stands behind the rate."""


def without_bars(text: str, *, fresh: bool = True) -> tuple[str, list[str]]:
    """(the text without tqdm's bars, the bars). `fresh`: whether a bar may begin a line, or only stand behind a
    carriage return."""
    if "%" not in text and "\r" not in text:
        return text, []
    bars: list[str] = []
    lines = []
    for line in re.sub(r"\r{2,}", "\r", text).split("\n"):
        if "\r" not in line and "%" not in line:
            lines.append(line)
            continue
        kept = ""
        for number, segment in enumerate(line.split("\r")):
            if end := _end_of_bar(segment, returned=number > 0, fresh=fresh):
                end += len(_RESET.match(segment, end)[0])  # type: ignore[index]
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
    return "\n".join(_last(line) for line in re.sub(r"\r{2,}", "\r", text).replace("\r\n", "\n").split("\n"))


def _last(line: str) -> str:
    kept, *later = line.split("\r")
    for written in later:
        if written:
            kept = "" if written.isspace() else written
    return kept


def _end_of_bar(segment: str, *, returned: bool, fresh: bool) -> int:
    """How many characters of a segment are a bar that it begins with; 0: none."""
    if "[" not in segment and "%|" not in segment:
        return 0
    if (returned or fresh) and (found := _OF_TOTAL.search(segment)) and _leads(segment, found):
        return _closed(segment, found.end())
    if not returned:  # the forms below might be anybody's
        return 0
    if (found := _OF_COUNT.search(segment)) and _COUNT.search(segment[: found.start()][-100:]):
        before = segment[: found.start()]
        if len(before) <= 100 or ": " in before[-100:]:
            return _closed(segment, found.end())
    return len(segment) if len(segment) <= _LONGEST and _CUT.match(ANSI.sub("", segment)) else 0


def _leads(segment: str, core: re.Match[str]) -> bool:
    """Whether what stands before n/total is a description, a per cent and a drawing."""
    end = core.start()
    if core["before"] == "|":
        end = segment.rfind("%|", max(0, end - _LONGEST), end)
    number = re.search(r"\d{1,9}\Z", segment[max(0, end - 9) : max(0, end)])
    if number is None:
        return False
    described = segment[: end - len(number[0])].rstrip(" ")
    return not described or described.endswith(":")


def _closed(segment: str, start: int) -> int:
    """The end of a bracket that is open at `start`, which may hold others; where none closes it, of the segment."""
    depth = 1
    for place in range(start, min(len(segment), start + _LONGEST)):
        depth += (segment[place] == "[") - (segment[place] == "]")
        if not depth:
            return place + 1
    first = segment.find("]", start, start + _LONGEST)
    return first + 1 if first >= 0 else len(segment)


def _level(moves: re.Match[str]) -> str:
    """Down by lines and up again, as nested bars are drawn: only what is left of it."""
    down, up = len(moves[1]), len(moves[2]) // len("\x1b[A")
    return "\n" * max(0, down - up) + "\x1b[A" * max(0, up - down)
