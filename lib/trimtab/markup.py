"""Text of documents and models made fit for a page: nothing in it is markup, hidden, or moves its surroundings."""

import html
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need, and that change nothing beyond their neighbours."""


class Shown(dict[int, str]):
    """What each character is shown as, for `str.translate`."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 0x20:
            shown = {"\n": "↵", "\t": "⇥"}.get(character) or chr(0x2400 + code)
        elif character == " " or character in JOINERS or unicodedata.category(character)[0] not in "CZ":
            shown = character
        else:
            shown = f"[U+{code:04X}]"
        self[code] = shown
        return shown


_SHOWN = Shown()


def visible(text: str) -> str:
    """The text with white space and control characters made visible, and nothing left that would reorder or hide its
    surroundings (terminal escapes, bidirectional marks, zero-width characters)."""
    return text.translate(_SHOWN)


def escaped(text: str) -> str:
    """`visible`, as HTML text or the value of an attribute."""
    return html.escape(visible(text), quote=True)


def whole_characters(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> Iterator[tuple[slice, str]]:
    """The text of tokens in pieces, each with the tokens that spell it: one, but for a character of several."""
    done, start = "", 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end]))
        if text.endswith("\ufffd") and end < len(ids):  # a character that the next token goes on with
            continue
        yield slice(start, end), text[len(done) :]
        done, start = text, end
