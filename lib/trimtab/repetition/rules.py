"""What the sections of repetition need of one another."""

from trimtab.repetition.comparison import check_arms
from trimtab.rules import Section, at_most, kinds_of, rule, told, within
from trimtab.validation import require


@rule("repetition", "corpus")
def _continuations_fit(repetition: Section, corpus: Section) -> None:
    length, most = repetition["prefix_tokens"] + repetition["tokens"], corpus["block_tokens"]
    fits = f"so few that with `prefix_tokens` they fit a block of {most} tokens (`block_tokens` of section `corpus`)"
    require(length <= most, "tokens", repetition["tokens"], fits)


@rule("repetition", "fetch")
def _domains_are_fetched(repetition: Section, fetch: Section) -> None:
    within("domains", repetition["domains"], kinds_of(fetch), "what `texts` of section `fetch` brings")


@rule("repetition_compare", "repetition")
def _repetition_compare(compare: Section, repetition: Section) -> None:
    told("arms", check_arms, compare["arms"])
    every = repetition["decoders"]
    within("quality_decoders", compare["quality_decoders"], every, "`decoders` of section `repetition`")
    once = [*every, *repetition["once_decoders"]]
    within("once_quality_decoders", compare["once_quality_decoders"], once, "section `repetition`")


at_most("repetition_compare", "clusters shown", "repetition.decoder_prefixes")
