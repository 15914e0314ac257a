"""What a page keeps of an output's HTML and Markdown: the looks of ordinary ones, and of tricks nothing that acts."""

import html
import re
import time
import unicodedata

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from tests.pages import Reader
from trimtab.pipeline.site.calm import OWN_CLASSES, calm_html, calm_markdown, calm_style, inline, is_calm, is_simple

from .conftest import ELSEWHERE, LOADING, TRICKS

ORDINARY = [
    "text-align: left; border: 1px solid rgba(128, 128, 128, 0.5)", "white-space: pre-wrap",
    "background-color: rgba(230, 159, 0, 0.35)", "background-color: rgba(128, 128, 128, 0.15)",
]  # fmt: skip
TRICKY = [
    "background: url(x)", r"background: u\rl(x)", "background: image-set('x' 1x)", "color: var(--x)", "margin: -1px",
    "width: calc(1px * 99999)", "margin: 0 0 0 -9em", "margin: 99999px", "margin: 1e9px", "padding: 100%", "top: 0",
    "position: fixed", "font-size: 500px", "font-size: 0", "width: 101%", "width: 99999px", "display: none",
    "display: contents", "opacity: 0", "vertical-align: 999px", "vertical-align: 50%", r"font-family: 'a\'; x",
    "color: red !important", "background: red/**/", "transform: none", "float: left", "font-weight: 9999",
    "border: 900px solid", "color: rgb(url(x))", "margin: +5px", "width: 5vw", "color: attr(x)", "background:",
    "background: element(#x)", "color: red url(x)", "color: transparent", "color: #00000000", "font-size: 1%",
    "background-color: #fff", "background-color: rgba(255, 255, 255, 0.9)", "line-height: 0", "color: rgb(0 0 0 / 0%)",
    "background-color: rgba(230, 159, 0, 0.5), url(x)", "opacity: 0.3", "margin: 64px", "width: 0px", "font: 0 x",
]  # fmt: skip
PIECES = [*TRICKS, "<", ">", '"', "'", "<b", " style=", "/>", "<!--", "-->", "<![CDATA[", "x", "&lt;"]
COMMANDS = [
    "kern-99em",
    "href{x}{y}",
    "style{x}{y}",
    "class{x}{y}",
    "hspace{-9em}",
    r"def\x{y}",
    "rlap{x}",
    "!x",
    r"\[999em]y",
    "begin{x}",
]


@pytest.mark.parametrize("style", ORDINARY)
def test_looks_of_ordinary_outputs_stay(style):
    assert calm_style(style) == style


@pytest.mark.parametrize("style", TRICKY)
def test_styles_that_fetch_hide_or_move_go(style):
    assert calm_style(style) == ""
    assert calm_style(f"text-align: left; {style}; white-space: pre-wrap") == "text-align: left; white-space: pre-wrap"


@pytest.mark.parametrize("trick", TRICKS)
def test_of_tricks_nothing_is_left_that_acts(trick):
    shown = calm_html(trick)
    assert is_calm(shown)
    assert "elsewhere" not in re.sub(r">[^<]*<", "><", shown)
    assert not is_calm(trick)


@given(st.lists(st.sampled_from(PIECES)))
def test_tricks_in_any_order_leave_nothing_that_acts(parts):
    assert is_calm(calm_html("".join(parts)))


def test_markdown_keeps_its_tables_code_and_simple_mathematics():
    table = "| a | b |\n|---|---|\n| 1 | $\\frac{1}{2}$ |"
    shown = calm_markdown(f"# T\n\n**b** `c` $x^2$\n\n{table}\n\n```text\n<x>\n```\n")
    for kept in (
        "<h1>",
        "<strong>b</strong>",
        "<code>c</code>",
        "\\(x^2\\)",
        "<table>",
        "\\(\\frac{1}{2}\\)",
        "&lt;x&gt;",
    ):
        assert kept in shown, kept


@pytest.mark.parametrize("command", COMMANDS)
def test_mathematics_that_moves_or_leads_is_shown_as_it_is_written(command):
    shown = calm_markdown(f"$\\{command}$")
    assert "<code>" in shown
    assert "math" not in shown


@pytest.mark.parametrize("formula", ["x % hidden", "x\u202ey", "x &#x202e; y"])
def test_mathematics_that_hides_or_reorders_is_shown_as_it_is_written(formula):
    assert not set("\u202e") & set(calm_markdown(f"${formula}$"))
    assert "math" not in calm_markdown(f"${formula}$") or "&amp;" in calm_markdown(f"${formula}$")


@pytest.mark.parametrize("sign", ["&#x202e;", "&#8238;", "\u202e", "&#x2066;", "&#8203;", "&ZeroWidthSpace;", "&rlm;"])
def test_characters_that_reorder_or_hide_are_named_however_they_are_written(sign):
    for shown in (calm_html(f"<b title='a{sign}'>a{sign}b</b>"), calm_markdown(f"a{sign}b `{sign}`")):
        assert not [each for each in shown if unicodedata.category(each) == "Cf"]
        assert "[U+" in shown
        assert is_calm(shown)
    assert not is_calm(f"<b>a{sign}b</b>")


@pytest.mark.parametrize("tag", ["details", "sup", "sub", "small", "rp", "template", "noscript", "dialog"])
def test_tags_that_fold_or_shrink_what_is_in_them_go(tag):
    assert f"<{tag}" not in calm_html(f"<div><{tag}>x</{tag}></div>")


UNITS = ["&", "<", "&a;", "<div>", "<b>x</p>", "<b title=", "<b/", "<!--", "<a x=", "<b a0 a1 a2 ", "\u202e", "1. a\n",
         "**a ", "`a", "$a$ ", "|a|\n", "<li><div>", "<?", "</", "a"]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("function", [calm_html, calm_markdown, is_calm])
def test_a_megabyte_of_any_text_passes_at_once(function, unit):
    began = time.process_time()
    function(unit * (1_000_000 // len(unit)))
    function(unit * (90_000 // len(unit)))
    assert time.process_time() - began < 4


def test_a_text_that_is_too_long_to_be_read_as_markup_is_shown_as_it_is_written():
    text = "<div>&" * 100_000
    assert calm_html(text) == f"<pre>{html.escape(text)}</pre>"
    assert is_calm(calm_html(text))


def test_the_formulas_of_every_notebook_are_shown_as_formulas(root):
    reader = MarkdownIt("commonmark").use(dollarmath_plugin, allow_labels=False, double_inline=True)
    sources = [cell.source for path in (root / "notebooks").rglob("*.ipynb") for cell in nbformat.read(path, 4).cells]
    tokens = [each for source in sources for token in reader.parse(source) for each in [token, *(token.children or [])]]
    formulas = [token.content for token in tokens if token.type.startswith("math")]
    assert len(formulas) > 50
    assert [formula for formula in formulas if not is_simple(formula)] == []


def test_markdown_leads_nowhere_and_loads_nothing():
    shown = calm_markdown(LOADING)
    assert is_calm(shown)
    assert not {"a", "img", "script", "iframe", "link", "meta"} & set(re.findall(r"<(\w+)", shown))


def test_text_of_a_record_is_no_markdown():
    text = f"![x]({ELSEWHERE}) [y]({ELSEWHERE}) <{ELSEWHERE}> <b>z</b> {{image}}`x` $x$ `` ` `` ```[a](b)` & \\| a | b"
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
    shown = renderer.render(f"| h |\n|---|\n| {inline(text)} |\n")
    assert set(re.findall(r"<(\w+)", shown)) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert Reader(shown).text.strip().endswith(text)


def test_the_site_has_no_class_of_the_themes_that_places_things():
    assert not {each for each in OWN_CLASSES if re.match(r"position|fixed|sticky|d-|m[tbsexy]?-", each)}
