"""A corpus of two domains in the form of the pipeline's."""

import polars as pl
import pytest

from trimtab.corpus import CorpusConfig, split_documents, token_blocks


@pytest.fixture(scope="session")
def corpus_folder(documents, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus-of-two")
    other = documents.with_columns(
        pl.lit("speeches").alias("source"), pl.col("text").str.replace_all("word", "speech").alias("text")
    )
    split = split_documents(pl.concat([documents, other]), CorpusConfig(val_fraction=0.2, test_fraction=0.2), seed=0)
    config = CorpusConfig(block_tokens=48, min_block_tokens=8, val_fraction=0.2, test_fraction=0.2)
    split.write_parquet(folder / "documents.parquet")
    token_blocks(split, tokenizer, config).write_parquet(folder / "blocks.parquet")
    sources = [{"source": "toy", "kind": "wikipedia"}, {"source": "speeches", "kind": "sotu"}]
    pl.DataFrame(sources).write_parquet(folder / "sources.parquet")
    return folder
