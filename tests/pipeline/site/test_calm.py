"""What a page keeps of an output's HTML and Markdown: the looks of ordinary ones, and of tricks nothing that acts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.pages import Reader
from trimtab.pipeline.site.calm import OWN_CLASSES, calm_html, calm_markdown, calm_style, inline, is_calm

from .conftest import ELSEWHERE, LOADING, TRICKS

ORDINARY = [
    "text-align: left; vertical-align: top; padding: 4px 8px; border: 1px solid rgba(128, 128, 128, 0.5)",
    "width: 100%", "margin: 8px 0px 2px 0px; opacity: 0.75", "font-size: 16px", "margin: 0 1.5em",
    "background-color: #fde725; color: #000", "background: rgb(240 228 66 / 0.5)", "font-family: 'DejaVu Sans', serif",
    "display: inline-block", "font-weight: 600", "border-radius: 0.3em", "white-space: pre-wrap; padding: 2px 0px",
]  # fmt: skip
TRICKY = [
    "background: url(x)", r"background: u\rl(x)", "background: image-set('x' 1x)", "color: var(--x)", "margin: -1px",
    "width: calc(1px * 99999)", "margin: 0 0 0 -9em", "margin: 99999px", "margin: 1e9px", "padding: 100%", "top: 0",
    "position: fixed", "font-size: 500px", "font-size: 0", "width: 101%", "width: 99999px", "display: none",
    "display: contents", "opacity: 0", "vertical-align: 999px", "vertical-align: 50%", r"font-family: 'a\'; x",
    "color: red !important", "background: red/**/", "transform: none", "float: left", "font-weight: 9999",
    "border: 900px solid", "color: rgb(url(x))", "margin: +5px", "width: 5vw", "color: attr(x)", "background:",
    "background: element(#x)", "color: red url(x)",
]  # fmt: skip
PIECES = [*TRICKS, "<", ">", '"', "'", "<b", " style=", "/>", "<!--", "-->", "<![CDATA[", "x", "&lt;"]
COMMANDS = ["kern-99em", "href{x}{y}", "style{x}{y}", "class{x}{y}", "hspace{-9em}", r"def\x{y}", "rlap{x}"]


@pytest.mark.parametrize("style", ORDINARY)
def test_looks_of_ordinary_outputs_stay(style):
    assert calm_style(style) == style


@pytest.mark.parametrize("style", TRICKY)
def test_styles_that_fetch_hide_or_move_go(style):
    assert calm_style(style) == ""
    assert calm_style(f"color: red; {style}; width: 1em").startswith("color: red")


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
