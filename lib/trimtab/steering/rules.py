"""What the sections of steering need of one another."""

from pathlib import Path

from trimtab.errors import InputError
from trimtab.rl.question_sets import QUESTION_SETS, open_question_set
from trimtab.rl.tasks import TASKS
from trimtab.rules import Section, at_most, rule, told
from trimtab.steering.comparison import check_arms
from trimtab.validation import nearest_of

QUESTION_FILES = (".jsonl", ".parquet")


@rule("steering")
def _steering(steering: Section) -> None:
    for key in ("task", "held_out", "other_tasks"):
        for spec in steering[key] if isinstance(steering[key], list) else [steering[key]]:
            if spec.startswith("hub:"):
                told(key, open_question_set, spec)
            elif (spec or key != "held_out") and spec not in TASKS and Path(spec).suffix not in QUESTION_FILES:
                known = [*TASKS, *(f"hub:{name}@main" for name in QUESTION_SETS)]
                raise InputError(
                    f"`{key}`: {spec!r} is not a task: give {', '.join(TASKS)}, hub:org/name@revision, or a .jsonl or "
                    f".parquet file{nearest_of(spec, known)}."
                )


@rule("steering_compare")
def _steering_compare(compare: Section) -> None:
    told("arms", check_arms, compare["arms"])


@rule("steering_lens", "steering", "steering_compare", "sae")
def _lens_reads_what_is_trained(lens: Section, steering: Section, compare: Section, sae: Section) -> None:
    first, arm = steering["seeds"][0], f"steering-layer{sae['site']}"
    if first not in sae["seeds"]:
        raise InputError(
            f"`seeds` of section `sae` must hold {first}, the first of section `steering`: not {sae['seeds']}."
        )
    if arm not in compare["arms"]:
        raise InputError(f"`arms` of section `steering_compare` must hold {arm}, whose vector the SAE reads.")


at_most("steering", "sampled_items", "steering.test_items")
at_most("steering", "prompts", "steering.train_items")
at_most("steering_controls", "prefix_items", "steering.train_items")
at_most("steering_lens", "items latent_items prompts_read", "steering.test_items")
at_most("steering_lens", "latents", "sae.latents")
