"""HTML and Markdown that can neither load nor move nor do anything: what a page may show of an output.

A browser's policy on every page (`build.POLICY`) keeps it from loading anything that should get through all the same.
"""

import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import nh3
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from trimtab.markup import visible

TAGS = nh3.ALLOWED_TAGS - {"a", "area", "img", "map", "bdo"}
"""Nothing that loads or leads: pictures are outputs of their own."""
ATTRIBUTES = {"*": {"style", "class", "title"}, "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan"}}
CLASSES = {"dataframe"}
"""Classes that outputs use. Any other may be one of the theme's, which can place an element anywhere on the page."""
MATH = {"math", "notranslate", "nohighlight"}
OWN_CLASSES = CLASSES | MATH | {"wide", "parameters", "provenance", "changed", "default", "verdict", "held", "not-held"}
OWN_CLASSES |= {"inconclusive"}
LENGTHS = {
    **dict.fromkeys(("border", "border-radius", "padding", "margin", "vertical-align"), 64),
    **{"width": 1600, "font-size": 48},
}
"""What an output may say of its looks: properties that take lengths, with the largest in pixels."""
PROPERTIES = {
    *LENGTHS,
    *("background", "background-color", "color", "text-align", "font-weight", "font-family", "white-space"),
    *("opacity", "overflow-wrap", "display"),
}
DISPLAYS = {"block", "inline", "inline-block", "table", "inline-table", "table-row", "table-cell", "list-item"}
PIXELS = {"px": 1, "pt": 4 / 3, "em": 16, "rem": 16, "ex": 8, "ch": 8}
_PART = re.compile(
    r"(?:(?P<number>\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})(?P<unit>px|pt|em|rem|ex|ch|%)?(?![\w.%+-])"
    r"|(?P<colour>#[0-9a-f]{3,8}(?![\w-])|(?:rgb|hsl)a?\([\d\s.,%/]{1,60}\))"
    r"|(?P<word>[a-z][a-z-]{0,40}(?![\w(-]))"
    r"|(?P<quoted>'[\w -]{0,60}'|\"[\w -]{0,60}\"))\s{0,20}(?:,\s{0,20})?",
    re.IGNORECASE | re.ASCII,
)
_COMMAND = re.compile(
    r"alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|"
    r"varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|frac|sqrt|sum|prod|int|"
    r"partial|nabla|infty|cdot|cdots|ldots|dots|times|div|pm|le|leq|ge|geq|ne|neq|approx|sim|equiv|propto|"
    r"in|notin|subset|cup|cap|to|mapsto|rightarrow|leftarrow|log|ln|exp|min|max|sin|cos|tan|tanh|mathbf|"
    r"mathrm|mathcal|mathbb|hat|bar|tilde|vec|dot|overline|left|right|text|operatorname|lVert|rVert|lvert|"
    r"rvert|langle|rangle|forall|exists|top|mid|ell|odot|otimes"
)
"""Commands of TeX that only draw, where they stand."""


def calm_html(text: str, classes: set[str] = CLASSES) -> str:
    """The text with only such tags, attributes and styles as show something in its place."""

    def attribute(tag: str, name: str, value: str) -> str | None:
        return calm_attribute(name, value, classes)

    return str(
        nh3.clean(text, tags=TAGS, attributes=ATTRIBUTES, attribute_filter=attribute, generic_attribute_prefixes=set())
    )


def calm_markdown(text: str) -> str:
    """Markdown as such HTML: headings, lists, tables, code and simple mathematics; links and pictures stay
    text."""
    return calm_html(_MARKDOWN.render(text), CLASSES | MATH)


def calm_attribute(name: str, value: str, classes: set[str] = CLASSES) -> str | None:
    """What may stay of an attribute; None: nothing."""
    match name:
        case "style":
            return calm_style(value) or None
        case "class":
            return " ".join(each for each in value.split() if each in classes) or None
        case "colspan" | "rowspan":
            return value if re.fullmatch(r"[1-9]\d{0,2}", value, re.ASCII) else None
        case "title":
            return value
    return None


def calm_style(style: str) -> str:
    """Declarations whose every part is a word, a colour or a length within bounds: nothing is fetched, hidden, or moved
    out of its place."""
    kept = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name.lower() in PROPERTIES and _is_calm(name.lower(), value):
            kept.append(f"{name.lower()}: {value}")
    return "; ".join(kept)


def is_calm(fragment: str) -> bool:
    """Whether a piece of HTML has nothing in it that `calm_html` would take out, but for the site's own classes."""
    reader = _Reader(convert_charrefs=True)
    reader.feed(fragment)
    reader.close()
    return reader.calm


def inline(text: str) -> str:
    """Text of a record as Markdown that shows it and nothing else."""
    return re.sub(r"[<>\[\]{}!&|$\\`]", lambda found: f"&#{ord(found[0])};", visible(text))


class _Reader(HTMLParser):
    calm = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        allowed = ATTRIBUTES["*"] | ATTRIBUTES.get(tag, set())
        for name, value in attrs:
            kept = calm_attribute(name, value or "", OWN_CLASSES) if name in allowed else None
            self.calm &= (kept or "") == (value or "") and (name in allowed)
        self.calm &= tag in TAGS

    def handle_decl(self, decl: str) -> None:
        self.calm = False

    def unknown_decl(self, data: str) -> None:
        self.calm = False

    def handle_pi(self, data: str) -> None:
        self.calm = False


def _is_calm(name: str, value: str) -> bool:
    place = 0
    while place < len(value):
        part = _PART.match(value, place)
        if part is None:
            return False
        if part["number"] and not _fits(name, float(part["number"]), part["unit"]):
            return False
        if name == "display" and (part["word"] or "").lower() not in DISPLAYS:
            return False
        place = part.end()
    return bool(value)


def _fits(name: str, number: float, unit: str | None) -> bool:
    if unit is None:
        return {"opacity": 0.3 <= number <= 1, "font-weight": 1 <= number <= 1000, "font-size": False}.get(
            name, number == 0
        )
    if unit == "%":
        return number <= {"width": 100, "border-radius": 100, "font-size": 300}.get(name, 0)
    least = 5 if name == "font-size" else 0
    return least <= number * PIXELS[unit.lower()] <= LENGTHS.get(name, 0)


def _math(content: str, display: bool) -> str:
    simple = len(content) < 500 and all(map(_COMMAND.fullmatch, re.findall(r"\\([a-zA-Z]+)", content)))
    if not simple:
        return f"<code>{html.escape(content)}</code>"
    opened, closed = ("\\[", "\\]") if display else ("\\(", "\\)")
    return f'<span class="math notranslate nohighlight">{opened}{html.escape(content)}{closed}</span>'


def _math_token(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    return _math(tokens[index].content, tokens[index].type != "math_inline")


_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": False}).enable(["table", "strikethrough"])
_MARKDOWN.use(dollarmath_plugin, allow_labels=False, double_inline=True)
_MARKDOWN.disable(["link", "image", "autolink", "html_inline", "html_block", "reference"])
for _kind in ("math_inline", "math_inline_double", "math_block"):
    _MARKDOWN.add_render_rule(_kind, _math_token)
