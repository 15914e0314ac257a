"""Wikitext to plain prose, for the dump extract that ships with gensim. Removal goes from the inside out, since
templates, tables and file links nest."""

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

MIN_LINE = 120
"""Characters under which a line is taken for a heading, caption or list item."""
MIN_ARTICLE = 500
"""Characters under which an article is dropped."""

_BLOCKS = re.compile(
    r"<(ref|math|gallery|timeline|code|source|pre)\b[^>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE
)
_INNERMOST = [re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)]
_FILE_LINK = re.compile(r"\[\[\s*(?:File|Image|Category)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?|ftp):\S+\s*([^\]]*)\]")


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article of a bz2 dump: namespace 0, redirects and stubs dropped, in dump order."""
    with bz2.open(dump) as file:
        title, namespace, text, redirect = "", "", "", False
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "ns":
                namespace = element.text or ""
            elif tag == "redirect":
                redirect = True
            elif tag == "text":
                text = element.text or ""
            elif tag == "page":
                if namespace == "0" and not redirect:
                    plain = plain_text(text)
                    if len(plain) > MIN_ARTICLE:
                        yield title, plain
                redirect = False
                element.clear()


def plain_text(wikitext: str) -> str:
    """The prose of one page: paragraphs separated by blank lines, no templates, tables, references or link marks."""
    text = html.unescape(html.unescape(wikitext))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = _BLOCKS.sub("", text)
    for pattern in (*_INNERMOST, _FILE_LINK):
        text = _until_stable(pattern, text)
    text = _until_stable(_LINK, text, r"\1")
    text = _EXTERNAL.sub(r"\1", text)
    text = re.sub(r"'{2,}|</?\w[^<>]*>", "", text)
    # Pronunciations and units were templates: close the holes that they leave.
    text = re.sub(r"\(\s*[;,]\s*", "(", text)
    text = re.sub(r"\s*\(\s*\)", "", text)
    text = re.sub(r"[ \t]+([,.;:])", r"\1", re.sub(r"[ \t]{2,}", " ", text))
    lines = (line.strip() for line in text.splitlines())
    return "\n\n".join(line for line in lines if len(line) > MIN_LINE and line[0] not in "*#:;=|!{}")


def _until_stable(pattern: re.Pattern[str], text: str, replacement: str = "") -> str:
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text
