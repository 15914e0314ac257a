"""What the sections of steering need of one another."""

from pathlib import Path

from trimtab.errors import InputError
from trimtab.rl.question_sets import QUESTION_SETS, open_question_set
from trimtab.rl.tasks import TASKS
from trimtab.rules import Section, rule, told
from trimtab.steering.comparison import check_arms
from trimtab.validation import nearest_of, require

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
    for key, limit in {"sampled_items": "test_items", "prompts": "train_items"}.items():
        require(steering[key] <= steering[limit], key, steering[key], f"at most `{limit}` = {steering[limit]}")


@rule("steering_controls", "steering")
def _steering_controls(controls: Section, steering: Section) -> None:
    most = steering["train_items"]
    require(controls["prefix_items"] <= most, "prefix_items", controls["prefix_items"], f"at most {most}, train_items")


@rule("steering_compare")
def _steering_compare(compare: Section) -> None:
    told("arms", check_arms, compare["arms"])


@rule("steering_lens", "steering")
def _steering_lens(lens: Section, steering: Section) -> None:
    most = steering["test_items"]
    for key in ("items", "latent_items", "prompts_read"):
        require(lens[key] <= most, key, lens[key], f"at most `test_items` = {most} of section `steering`")


@rule("steering_lens", "steering", "steering_compare", "sae")
def _lens_reads_what_is_trained(lens: Section, steering: Section, compare: Section, sae: Section) -> None:
    require(max(lens["latents"]) <= sae["latents"], "latents", lens["latents"], f"at most {sae['latents']}, the SAE's")
    first, arm = steering["seeds"][0], f"steering-layer{sae['site']}"
    if first not in sae["seeds"]:
        raise InputError(
            f"`seeds` of section `sae` must hold {first}, the first of section `steering`: not {sae['seeds']}."
        )
    if arm not in compare["arms"]:
        raise InputError(f"`arms` of section `steering_compare` must hold {arm}, whose vector the SAE reads.")
