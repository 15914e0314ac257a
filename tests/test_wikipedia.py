"""Wikitext is reduced to prose: marks nest, and what they leave behind is closed."""

import bz2

import pytest

from trimtab.wikipedia import articles, plain_text

TAIL = (
    " This sentence only makes the line long enough to count as prose, for which it takes well over one hundred "
    "and twenty characters."
)


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("A '''bold''' [[link|word]] and [[plain]].", "A bold word and plain."),
        ("Nested {{a|{{b|{{c}}}}}}marks.", "Nested marks."),
        ("Before {| class=x\n| a {| inner |} b\n|} after.", "Before after."),
        ("See [[File:x.jpg|thumb|a [[caption]] here]]this.", "See this."),
        ("Text&amp;nbsp;here<ref name=x>no</ref> and<ref name=y/> there.", "Text\xa0here and there."),
        ("Anarchism ({{IPA|x}}; {{lang}}) is.", "Anarchism is."),
        ("Visit [http://x.org the site] now <!-- gone\n --> please.", "Visit the site now please."),
        ("An area of {{convert|3|km}} , indeed.", "An area of, indeed."),
    ],
)
def test_marks(wikitext, prose):
    assert plain_text(wikitext + TAIL) == prose + TAIL


def test_short_lines_and_lists_are_dropped_and_paragraphs_kept():
    text = f"== Heading ==\n* item{TAIL}\nFirst.{TAIL}\n\n|cell{TAIL}\nSecond.{TAIL}\nshort"
    assert plain_text(text) == f"First.{TAIL}\n\nSecond.{TAIL}"


def test_only_whole_articles_are_kept(tmp_path):
    long = "Word." + TAIL * 5
    pages = [
        ("Good", 0, long, ""),
        ("Talk:Good", 1, long, ""),
        ("Moved", 0, long, '<redirect title="Good"/>'),
        ("Stub", 0, TAIL, ""),
        ("Last", 0, long.replace("Word", "Other"), ""),
    ]
    body = "".join(
        f"<page><title>{t}</title><ns>{n}</ns>{r}<revision><text>{x}</text></revision></page>" for t, n, x, r in pages
    )
    dump = tmp_path / "d.bz2"
    dump.write_bytes(bz2.compress(f'<mediawiki xmlns="http://x/">{body}</mediawiki>'.encode()))
    assert list(articles(dump)) == [("Good", long), ("Last", long.replace("Word", "Other"))]
