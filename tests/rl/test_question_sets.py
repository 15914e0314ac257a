"""Question sets come from files and hubs, keep their own splits, and never train on what they test."""

import json

import datasets
import polars as pl
import pytest

from trimtab.errors import InputError
from trimtab.rl.question_sets import QUESTION_SETS, QuestionSet
from trimtab.rl.tasks import BOXED, SPLITS, open_task, split_of

GOOD = '{"question": "Why?", "answer": "1"}'
ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]


def write(path, rows):
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def everything(task, split):
    """All items of a split: asking for too many says how many there are."""
    with pytest.raises(InputError) as error:
        task.items(split, 10**6, seed=0)
    held = int(str(error.value).split(" has ")[1].split(" ")[0])
    return task.items(split, held, seed=0) if held else []


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_is_shared_out_by_the_text_of_its_questions(tmp_path, suffix):
    task = open_task(write(tmp_path / f"sums.{suffix}", ROWS))
    found = {split: everything(task, split) for split in SPLITS}
    assert sum(map(len, found.values())) == 200
    for split, items in found.items():
        assert all(split_of(item.question) == split for item in items)
    item = found["test"][0]
    assert (item.task, item.instruction) == (task.name, BOXED)
    assert task.reward(f"\\boxed{{{item.answer}}}", item) == 1
    assert task.reward(item.answer, item) == 0


def test_a_seed_orders_train_and_nothing_else(tmp_path):
    task = open_task(write(tmp_path / "sums.jsonl", ROWS))
    assert task.items("train", 50, seed=0) == task.items("train", 60, seed=0)[:50]
    assert task.items("train", 50, seed=0) != task.items("train", 50, seed=1)
    assert task.items("test", 50, seed=0) == task.items("test", 50, seed=1)


def test_splits_of_its_own_are_kept_and_val_comes_out_of_train(tmp_path):
    rows = [row | {"split": "train" if i < 150 else "test"} for i, row in enumerate(ROWS)]
    task = open_task(write(tmp_path / "sums.jsonl", rows))
    found = {split: {item.question for item in everything(task, split)} for split in SPLITS}
    assert found["test"] == {row["question"] for row in ROWS[150:]}
    assert found["val"] == {row["question"] for row in ROWS[:150] if split_of(row["question"]) == "val"}
    assert found["train"] == {row["question"] for row in ROWS[:150]} - found["val"]


def test_a_question_of_two_splits_counts_for_test(tmp_path):
    rows = [row | {"split": split} for split in ("train", "validation", "test") for row in ROWS[:3]]
    rows += [row | {"split": "train"} for row in ROWS[3:6]] + [row | {"split": "validation"} for row in ROWS[5:8]]
    task = open_task(write(tmp_path / "sums.jsonl", rows))
    assert [len(everything(task, split)) for split in SPLITS] == [2, 3, 3]


@pytest.mark.parametrize(
    ("cell", "gold"),
    [
        ("72", "72"), (72, "72"), (0, "0"), ("48 / 2 = 24\n#### 24", "24"),
        (r"So $x$ is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (["5"], "5"), (["1", "2"], "1, 2"), (" $x$ ", "$x$"),
    ],
)  # fmt: skip
def test_the_gold_answer_of_a_cell(tmp_path, cell, gold):
    task = open_task(write(tmp_path / "one.jsonl", [{"question": "Which?", "answer": cell}]))
    assert [item.answer for item in everything(task, split_of("Which?"))] == [gold]


def test_rows_without_question_or_answer_are_left_out(tmp_path):
    rows = [{"question": None, "answer": "1"}, {"question": "Why?", "answer": None}, {"question": "How?", "answer": ""}]
    task = open_task(write(tmp_path / "empty.jsonl", rows))
    assert not any(everything(task, split) for split in SPLITS)


def test_named_columns_and_another_verifier(tmp_path):
    source = write(tmp_path / "words.jsonl", [{"ask": "Capital of France?", "say": "Paris"}])
    task = QuestionSet(
        name="words",
        source=source,
        question="ask",
        answer="say",
        verifier="exact",
        instruction="One word.",
        only="test",
    )
    (item,) = everything(task, "test")
    assert (task.reward("Paris.", item), task.reward("It is Paris.", item)) == (1, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "x"}', r"a.jsonl: line 1 has no column `answer`; it has question"),
        ("a.jsonl", '{"question": ', "Cannot read .*a.jsonl, line 1: not JSON"),
        ("a.parquet", "question", "Cannot read .*a.parquet, no whole parquet file"),
        ("a.jsonl", "", r"a\.jsonl holds no rows"),
        ("a.jsonl", f'{GOOD}\n{{"answer": "x"}}', r"line 2 has no column `question`; it has answer"),
        ("a.jsonl", f'{GOOD}\n"x"', r"a\.jsonl, line 2: a string where an object with named columns"),
        ("a.jsonl", f"{GOOD}\n\n[1]", r"a\.jsonl, line 3: a list where an object with named columns"),
        ("a.jsonl", f'{GOOD}\n{{"question": {{}}, "answer": 1}}', "line 2 has a `question` that is an object"),
        ("a.jsonl", f'{GOOD}\n{{"question": 5, "answer": 1}}', "line 2 has a `question` that is a number"),
        ("a.jsonl", f'{GOOD}\n{{"question": "q", "answer": {{}}}}', "line 2 has an `answer` that is an object"),
        ("a.jsonl", f'{GOOD}\n{{"question": "q", "answer": [[]]}}', "an `answer` that is a list in a list"),
        ("a.jsonl", '{"question": "\udce4"}', r"a\.jsonl, line 1: not in UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message) as caught:
        open_task(str(tmp_path / name)).items("train", 1, seed=0)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_network_a_set_of_the_hub_is_said_to_be_out_of_reach():
    with pytest.raises(InputError, match="Cannot fetch hub:org/set@main, the hub cannot be reached from here"):
        open_task("hub:org/set@main").items("train", 1, seed=0)


def test_the_hub_path_reads_a_data_set_with_its_splits(tmp_path):
    """`datasets` takes a folder of files for a data set: the same code path, without a network."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:150])
    write(folder / "test.jsonl", ROWS[150:])
    task = open_task(f"hub:{folder}@main")
    assert len(everything(task, "test")) == 50
    assert len(everything(task, "train")) + len(everything(task, "val")) == 150


def test_a_hub_source_needs_a_revision_and_a_set(tmp_path):
    with pytest.raises(InputError, match="is not a hub source: write hub:org/name@revision"):
        open_task("hub:openai/gsm8k")
    with pytest.raises(InputError, match="Cannot fetch hub:nobody/nothing@main"):
        open_task("hub:nobody/nothing@main").items("train", 1, seed=0)


@pytest.mark.parametrize("repository", QUESTION_SETS)
def test_the_papers_sets_are_read_by_their_own_columns(repository, monkeypatch):
    """As the hub has them, but for their size: no network here."""
    columns = {
        "agentica-org/DeepScaleR-Preview-Dataset": {"train": {"problem": "Q", "answer": "5", "solution": "S"}},
        "openai/gsm8k": {
            "train": {"question": "P", "answer": "A\n#### 6"},
            "test": {"question": "Q", "answer": "A\n#### 5"},
        },
        "HuggingFaceH4/MATH-500": {
            "test": {"problem": "Q", "solution": "S", "answer": "5", "subject": "A", "level": 1}
        },
        "Maxwell-Jia/AIME_2024": {"train": {"ID": "1", "Problem": "Q", "Solution": "S", "Answer": 5}},
        "opencompass/AIME2025": {"test": {"question": "Q", "answer": "5"}},
        "knoveleng/AMC-23": {
            "train": {"id": 1, "problem": "Q", "question": "Q, answer only", "answer": "5", "url": ""}
        },
        "knoveleng/Minerva-Math": {"train": {"problem": "Q", "solution": r"S: $\boxed{5}$", "type": "A", "idx": 1}},
        "knoveleng/OlympiadBench": {
            "train": {"question": "Q", "answer": "5", "final_answer": ["5"], "solution": ["S"]}
        },
    }
    asked = []

    def load_dataset(path, config, revision):
        asked.append((path, config, revision))
        return {split: [row] for split, row in columns[path].items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = open_task(f"hub:{repository}@v1")
    split = "train" if "DeepScaleR" in repository else "test"
    split = split_of("Q") if split == "train" and split_of("Q") == "val" else split
    (item,) = everything(task, split)
    assert (item.question, item.answer) == ("Q", "5")
    assert task.reward(r"\boxed{5}", item) == 1
    configs = {"openai/gsm8k": ["main"], "opencompass/AIME2025": ["AIME2025-I", "AIME2025-II"]}.get(repository, [None])
    assert asked[: len(configs)] == [(repository, config, "v1") for config in configs]
    assert everything(open_task(f"hub:{repository}::other@v1"), split)
    assert asked[-1][1] == "other"
