"""HTML and Markdown that can neither load nor move nor do anything: what a page may show of an output.

A browser's policy on every page (`build.POLICY`) keeps it from loading anything that should get through all the same.
"""

import html
import re
from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from trimtab.markup import Shown, visible

TAGS = {
    *("b", "strong", "i", "em", "u", "s", "code", "pre", "kbd", "samp", "span", "div", "p", "br", "hr", "blockquote"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd"),
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
}
"""Nothing that loads, leads, folds or makes small: pictures are outputs of their own."""
ATTRIBUTES = {"*": {"style", "class", "title"}, "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan"}}
CLASSES = {"dataframe"}
"""Classes that outputs use. Any other may be one of the theme's, which can place an element anywhere on the page."""
MATH = {"math", "notranslate", "nohighlight"}
OWN_CLASSES = CLASSES | MATH | {"wide", "parameters", "provenance", "changed", "default", "verdict", "held", "not-held"}
OWN_CLASSES |= {"inconclusive"}
LONGEST, LONGEST_MARKDOWN, MOST_MARKUP = 250_000, 100_000, 10_000
"""Characters, and of these `<` and `&`, up to which a text is read as markup: parsers may take time quadratic in it."""
STYLE = (
    r"text-align: left|white-space: pre-wrap|border: 1px solid rgba\(128, 128, 128, 0\.5\)"
    r"|background-color: rgba\((?:230, 159, 0|128, 128, 128), 0\.\d{1,2}\)"
)
"""All that outputs may say of their looks, as the library's own pages do: on these grounds black and white text can be
read, however many of them lie on each other."""
_CLASS = "|".join(OWN_CLASSES)
_CALM = re.compile(
    rf"(?:[^<&]++|&(?:amp|lt|gt|quot|nbsp|middot|#x27);|</?(?:{'|'.join([*TAGS, 'details', 'summary'])})(?: (?:"
    rf"class=(?:(?:{_CLASS})(?![^ >])|\"(?:{_CLASS})(?: (?:{_CLASS}))*\")"
    rf"|title=\"(?:[^\"<>&]|&(?:amp|lt|gt|quot|nbsp);)*+\""
    rf"|(?:row|col)span=\"[1-9]\d{{0,2}}\"|style=\"(?:{STYLE})(?:; (?:{STYLE}))*\"))*+>)*+",
    re.ASCII,
)
_COMMAND = re.compile(
    r"alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|"
    r"varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|frac|sqrt|sum|prod|int|"
    r"partial|nabla|infty|cdot|cdots|ldots|dots|times|div|pm|le|leq|ge|geq|ne|neq|approx|sim|equiv|propto|"
    r"in|notin|gg|quad|qquad|tfrac|textstyle|Vert|Pr|subset|cup|cap|to|mapsto|rightarrow|leftarrow|log|ln|exp|min|max|sin|cos|tan|tanh|mathbf|"
    r"mathrm|mathcal|mathbb|hat|bar|tilde|vec|dot|overline|left|right|text|operatorname|lVert|rVert|lvert|"
    r"rvert|langle|rangle|forall|exists|top|mid|ell|odot|otimes|[{}|,;_%#$& ]"
)
"""Commands of TeX that only draw, where they stand."""


_SEEN = Shown({9: "\t", 10: "\n"})


def seen(text: str) -> str:
    """Text of several lines with nothing left in it that hides or reorders; see `visible`."""
    return text.translate(_SEEN)


def calm_html(text: str, classes: set[str] = CLASSES) -> str:
    """The text with only such tags, attributes and styles as show something in its place; where it is too long to be
    read as markup, as it is written."""

    def attribute(tag: str, name: str, value: str) -> str | None:
        return calm_attribute(name, value, classes)

    if len(text) > LONGEST or text.count("<") + text.count("&") > MOST_MARKUP:
        return f"<pre>{html.escape(seen(text))}</pre>"
    clean = nh3.clean(
        text, tags=TAGS, attributes=ATTRIBUTES, attribute_filter=attribute, generic_attribute_prefixes=set()
    )
    return seen(clean)  # what was written as `&#x202e;` is a character now


def calm_markdown(text: str) -> str:
    """Markdown as such HTML: headings, lists, tables, code and simple mathematics; links and pictures stay
    text."""
    if len(text) > LONGEST_MARKDOWN:
        return f"<pre>{html.escape(seen(text))}</pre>"
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
    """Those declarations that are in `STYLE`."""
    declarations = (" ".join(each.split()).replace(" :", ":") for each in style.split(";"))
    return "; ".join(each for each in declarations if re.fullmatch(STYLE, each, re.ASCII))


def is_calm(fragment: str) -> bool:
    """Whether a piece of HTML has nothing in it that `calm_html` would take out, but for what only the site itself
    writes. Takes time linear in any text."""
    return _CALM.fullmatch(fragment) is not None and seen(fragment) == fragment


def is_simple(formula: str) -> bool:
    """Whether a formula in TeX only draws, and all of it."""
    known = all(map(_COMMAND.fullmatch, re.findall(r"\\([a-zA-Z]+|.|\n|\Z)", formula)))
    return known and len(formula) < 500 and not re.search(r"(?<!\\)%", formula) and seen(formula) == formula


def inline(text: str) -> str:
    """Text of a record as Markdown that shows it and nothing else."""
    return re.sub(r"[<>\[\]{}!&|$\\`]", lambda found: f"&#{ord(found[0])};", visible(text))


def _math(content: str, display: bool) -> str:
    if not is_simple(content):
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
