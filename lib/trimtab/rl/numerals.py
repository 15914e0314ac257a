"""Numbers as people and models write them, read exactly: signs, thousands, fractions, powers of ten, percent, units.

What has still to be worked out - 7+9, 2^4, sqrt(16), 5x, 5 million - is no numeral. A sum that a policy copies from its
question would otherwise be the answer to it.
"""

import re
from fractions import Fraction
from typing import NamedTuple

SIGNS = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\ufe63": "-", "×": "*", "·": "*", "⋅": "*",
     "÷": "/", "\u2044": "/", "\u2215": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "\u200b": "", "\ufeff": "",
     "\u00a0": "\u202f", "\u2009": "\u202f", "\u2007": "\u202f", "\u2008": "\u202f"}
    | {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}  # full-width forms
)  # fmt: skip
"""Characters that have a plain one for them; narrow spaces, which group digits, become one of them."""
GROUPS = r"(?:[,\u202f_']|\\[,!; ]|\{,\}|~)"
DIGITS = rf"(?:[0-9]{{1,3}}(?:{GROUPS}[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
POWER = r"\s*(?:\*|x|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*(?:[{(]\s*([-+]?\s*[0-9]{1,3})\s*[)}]|([-+]?[0-9]{1,3}))"
NUMBER = re.compile(rf"({DIGITS})(?:[eE]([-+]?[0-9]{{1,3}})(?![0-9.])|{POWER})?")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?")
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))")
WRAPPED = re.compile(
    r"\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\{(.*)\}|\((.*)\)"
    r"|\\(?:text|textbf|mathbf|mathrm|mathit|bf|rm|mbox|boxed|fbox|displaystyle|bm|boldsymbol|ensuremath)\s*\{(.*)\}",
    re.DOTALL,
)
UNFINISHED = (
    *("hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "third", "quarter", "point", "squared"),
    *("cubed", "double", "twice", "times", "plus", "minus", "over", "or", "and", "to", "mod", "factorial"),
    *("k", "e", "i", "pi", "x", "y", "z", "n"),
)
"""Words after a number with which it is another number, or several, or none."""
UNIT = re.compile(
    r"(?:\s|~|\\[,;:! ])*(?:\\?%|\\?\$|°|\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\(?:circ|degree)"
    r"|\\(?:text|mathrm|textrm|rm|mbox|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*\{?[23]\}?)?"
    r"|([A-Za-z]+(?:[ ./][A-Za-z]+)*)\.?(?:\s*\^\s*\{?[23]\}?)?)\s*$"
)


class Numeral(NamedTuple):
    """A number, and whether it stands before a sign of percent."""

    value: Fraction
    percent: bool = False

    def equals(self, other: "Numeral") -> bool:
        """Equal to the last digit; 25% is 25 and 0.25."""
        (a, percent), (b, other_percent) = self, other
        return a == b or (percent and not other_percent and a / 100 == b) or (other_percent and a == b / 100)


def numeral(text: str) -> Numeral | None:
    """The number that a text is, all of it, in plain or LaTeX notation; None where it is anything else."""
    text = _unwrapped(_plain(text).strip())
    text = re.sub(r"^(\s*[-+]?\s*)(?:\\?\$|[£€¥])\s*", r"\1", text)
    percent = False
    while (unit := UNIT.search(text)) and unit.group():
        words = (unit[1] or unit[2] or "").lower().split()
        if any(word in UNFINISHED for word in words):
            return None
        percent = percent or "%" in unit.group() or words == ["percent"]
        text = text[: unit.start()]
    text = _unwrapped(text).removesuffix(".")
    sign = re.match(r"\s*([-+]?)\s*", text)
    value = _magnitude(text[sign.end() :].strip()) if sign else None
    return None if value is None or sign is None else Numeral(-value if sign[1] == "-" else value, percent)


def numbers(text: str, *, fractions: bool) -> list[Fraction | None]:
    """The numbers of a prose text, in order; None for each that has to be worked out or is part of a name: 8 - 4, 2^4,
    sqrt(16), 5x, v2. A fraction, 1/2, is a number where `fractions`, otherwise a division."""
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", _plain(text))
    found: list[Fraction | None] = []
    for number in (QUOTIENT if fractions else STANDING).finditer(text):
        before, after = text[max(0, number.start() - 40) : number.start()], text[number.end() : number.end() + 40]
        sign = SIGNED.search(before)
        value = _magnitude(number.group())
        partial = (OPERAND if sign else OPERATOR).search(before, 0, sign.start() if sign else len(before))
        if value is not None and sign and sign[1] == "-":
            value = -value
        found.append(None if partial or GOES_ON.match(after) else value)
    return found


STANDING = re.compile(rf"(?<![0-9.])(?:{NUMBER.pattern})")
QUOTIENT = re.compile(rf"(?<![0-9.])(?:[0-9]+\s*/\s*[0-9]+(?![0-9.])|{NUMBER.pattern})")
SIGNED = re.compile(r"([-+])[ \t]*(?:\\?[$£€¥])?[ \t]*$")
VARIABLE = r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
OPERAND = re.compile(rf"(?:[0-9)\]}}!%]|{VARIABLE})[ \t]*$")
"""At the end of what stands before a sign: then it is a difference or a sum."""
OPERATOR = re.compile(
    rf"(?:(?:[0-9)\]}}!%]|{VARIABLE})[ \t]*(?:\*\*?|/)|[\^_]|\\(?:times|cdot|div|pm|sqrt)"
    rf"|(?<![A-Za-z])(?:sqrt|log|ln|exp|sin|cos|tan|abs|gcd|lcm|max|min))\s*[({{\[]*\s*$"
    rf"|(?:[0-9)}}\]]|{VARIABLE})[({{\[]\s*$|[A-Za-z_]$|[0-9]:$"
)
"""At the end of what stands before a number: then it is not the whole of what is meant."""
GOES_ON = re.compile(
    rf"\.[0-9]|:[0-9]|\s*[²³¹⁰⁴-⁹½⅓⅔¼¾⅛]|!(?=[ \t]*[-+*/])"
    rf"|\s*[)}}\]]*[ \t]*(?:\*\*?|[/^]|[-+](?!\s*>))(?:[ \t]*[-+({{\[]*[ \t]*[0-9\\.$]|[ \t]*[({{\[]|{VARIABLE})"
    rf"|[ \t]*[-+][ \t]*{VARIABLE}"
    rf"|[ \t]*(?:(?i:{'|'.join(w for w in UNFINISHED if len(w) > 3)})|[xyznei]|pi|k|\\(?:pi|sqrt|times|cdot|div|frac))"
    r"(?![A-Za-z0-9])"
)
"""At the beginning of what follows a number: then it is not the whole of what is meant."""


def _plain(text: str) -> str:
    """A longer dash is a sign where a number follows at once, and a dash elsewhere."""
    return re.sub(r"\u2013(?=[0-9.$\\])", "-", text.translate(SIGNS))


def _unwrapped(text: str) -> str:
    """Without the marks around the whole of it: dollars, brackets, commands that set type."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:)(?![A-Za-z0-9])", "", text)
    while (whole := WRAPPED.fullmatch(text.strip())) and _balanced(
        inner := next(g for g in whole.groups() if g is not None)
    ):
        text = inner
    return text.strip()


def _balanced(text: str) -> bool:
    depth = 0
    for bracket in re.findall(r"[(){}]", text):
        depth += 1 if bracket in "({" else -1
        if depth < 0:
            return False
    return depth == 0 and "$" not in text


def _magnitude(text: str) -> Fraction | None:
    """Without a sign: digits, thousands, a power of ten, a fraction, or a whole number and a fraction."""
    if whole := NUMBER.fullmatch(re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", ",", text)):
        exponent = next((part for part in whole.groups()[1:] if part), "0").replace(" ", "")
        return Fraction(re.sub(GROUPS, "", whole[1])) * Fraction(10) ** int(exponent)
    if repeating := REPEATING.fullmatch(text):
        integer, fixed, again = repeating.groups()
        scale = 10 ** len(fixed)
        return Fraction(int(f"{integer}{fixed}" or 0), scale) + Fraction(int(again), (10 ** len(again) - 1) * scale)
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    if parts := re.fullmatch(r"(?:([0-9]+)\s+)?(-?[0-9]+)\s*/\s*(-?[0-9]+)", text):
        above, below = int(parts[2]), int(parts[3])
        if below and (parts[1] is None or 0 < above < below):
            return Fraction(above, below) + int(parts[1] or 0)
    return None
