"""Tasks keep their splits apart whatever the seeds, repeat themselves exactly, and pay only for right answers."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest

from trimtab.errors import InputError
from trimtab.pretrained import load_tokenizer
from trimtab.rl.tasks import BOXED, NUMBER, SPLITS, TASKS, Item, chat_prompt, open_task, split_of

MODEL = Path(__file__).parents[2] / "data/model"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def questions(name, split, n, seed):
    return [item.question for item in TASKS[name].items(split, n, seed)]


@pytest.mark.parametrize(("name", "train", "val", "test"), [("sum", 800, 150, 500), ("gcd", 3_000, 500, 3_000)])
def test_splits_are_disjoint_whatever_the_seeds(name, train, val, test):
    drawn = {split: set() for split in SPLITS}
    for seed in (0, 1, 2, 12_345, 2**32):
        for split, n in zip(SPLITS, (train, val, test), strict=True):
            items = TASKS[name].items(split, n, seed)
            assert len({item.question for item in items}) == n, "a question comes twice"
            assert {split_of(item.subject) for item in items} == {split}
            if name != "sum":
                assert all(item.subject in item.question for item in items)
            drawn[split] |= {item.subject for item in items}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["val"]
    assert not drawn["val"] & drawn["test"]


def test_all_wordings_of_a_sum_and_of_its_terms_the_other_way_round_are_of_one_split():
    items = {split: TASKS["sum"].items(split, n, 0) for split, n in (("train", 850), ("test", 530))}
    pairs = {
        split: {tuple(sorted(re.findall(r"\d+", item.question))) for item in found if "+" in item.question}
        for split, found in items.items()
    }
    assert not pairs["train"] & pairs["test"]
    by_subject = Counter(item.subject for item in items["test"])
    assert sum(count in (8, 16) for count in by_subject.values()) >= len(by_subject) - 1, "the last may be cut short"
    for item in items["test"]:
        a, b = re.findall(r"\d+", item.question)
        assert item.subject in (f"{a} + {b}", f"{b} + {a}", f"{a} - {b}")


def test_the_split_is_a_property_of_the_text_and_has_its_share():
    assert [split_of(f"{a} + {b} =") for a, b in ((4, 5), (5, 4), (1, 2), (9, 9))] == PINNED
    shares = Counter(split_of(f"question {i}") for i in range(20_000))
    for split, share in (("train", 0.5), ("val", 0.1), ("test", 0.4)):
        assert abs(shares[split] / 20_000 - share) < 0.02


PINNED = ["test", "val", "train", "test"]


@pytest.mark.parametrize("name", TASKS)
def test_equal_arguments_give_equal_items_and_fewer_are_the_first_of_more(name):
    task = TASKS[name]
    for split in SPLITS:
        some = task.items(split, 6, seed=3)
        assert some == task.items(split, 6, seed=3)
        assert some[:4] == task.items(split, 4, seed=3)
        same = task.items(split, 6, seed=4) == some
        assert same == (split != "train"), "a seed orders train, and train alone"


def test_near_seeds_share_no_stretch():
    """reasoning-gym's own item i depends on seed + i: its data sets of seeds 0 and 1 are one and the same, shifted."""
    first, second = (set(questions("gcd", "train", 500, seed)) for seed in (0, 1))
    assert len(first & second) < 5


def test_a_space_too_small_is_named_with_its_size():
    with pytest.raises(InputError, match=r"product has \d+ distinct test questions, not 100: ask for fewer"):
        TASKS["product"].items("test", 100, seed=0)
    sizes = []
    for split in SPLITS:
        with pytest.raises(InputError) as error:
            TASKS["product"].items(split, 101, seed=0)
        sizes.append(int(re.search(r"has (\d+)", str(error.value))[1]))
        assert len(TASKS["product"].items(split, sizes[-1], seed=9)) == sizes[-1]
    assert sum(sizes) == 100


@pytest.mark.parametrize(("split", "n"), [("validation", 5), ("test", 0)])
def test_a_split_that_is_none_is_refused(split, n):
    with pytest.raises(InputError, match=r"sum: ask for one item or more of train, val, test"):
        TASKS["sum"].items(split, n, seed=0)


@pytest.mark.parametrize("name", TASKS)
def test_its_own_answer_is_right_and_others_are_not(name):
    task = TASKS[name]
    for item in task.items("test", 10, seed=0):
        boxes = task.verifier == "boxed"
        right = f"It is \\boxed{{{item.answer}}}." if boxes else item.answer
        assert task.reward(right, item) == 1
        for wrong in ("", item.answer + "7", f"{item.answer} or 7777", "I do not know"):
            assert task.reward(wrong, item) == 0
        said = task.reward(f"The answer is {item.answer}", item)
        assert said == (task.verifier == "last_number")


@pytest.mark.parametrize("name", ["sum", "sum-3terms", "sum-2digit", "product"])
def test_the_subject_of_arithmetic_is_an_expression_with_its_value(name):
    for item in TASKS[name].items("train", 30, seed=0):
        assert re.fullmatch(r"\d+( [-+*] \d+)+", item.subject)
        assert str(eval(item.subject)) == item.answer


def test_sorting_asks_for_whole_numbers_in_a_plain_list():
    for item in TASKS["sorting"].items("train", 30, seed=0):
        direction, numbers = re.fullmatch(
            r"Sort in (ascending|descending) order: (\d+, \d+, \d+)", item.question
        ).groups()
        ordered = sorted(map(int, numbers.split(", ")), reverse=direction == "descending")
        assert item.answer == ", ".join(map(str, ordered))


def test_what_measures_transfer_holds_no_question_of_the_task_itself():
    assert {len(item.subject.split()) for item in TASKS["sum"].items("train", 300, 0)} == {3}
    assert all(len(item.subject.split()) == 5 for item in TASKS["sum-3terms"].items("test", 100, 0))
    assert all(re.fullmatch(r"\d\d [-+] \d\d", item.subject) for item in TASKS["sum-2digit"].items("test", 100, 0))


def test_countdown_takes_any_right_expression():
    task = TASKS["countdown"]
    (item,) = task.items("test", 1, seed=0)
    assert task.reward(f"0 + {item.answer}", item) == 0, "a number that was not given"
    assert task.reward(f"({item.answer})", item) == 1


def test_a_foreign_item_is_refused():
    with pytest.raises(InputError, match="sum cannot judge an item of product"):
        TASKS["sum"].reward("5", TASKS["product"].items("test", 1, seed=0)[0])


@pytest.mark.parametrize("spec", ["summ", "missing.jsonl", "notes.txt", ""])
def test_what_is_no_task_is_refused(spec):
    with pytest.raises(InputError, match=r"is not a task: give sum, .*, hub:org/name@revision, or an existing"):
        open_task(spec)
    assert open_task("sum") is TASKS["sum"]


class TestChatPrompt:
    item = Item("sum", "4 + 5 - 2 =", "7", NUMBER)

    def test_without_a_template_it_is_a_plain_frame(self, tokenizer):
        text = tokenizer.decode(chat_prompt(tokenizer, self.item))
        assert text == "Answer with a number only.\n\nQuestion: 4 + 5 - 2 =\nAnswer:"

    def test_with_one_it_is_the_templates_text(self, tokenizer):
        chatty = copy.deepcopy(tokenizer)
        chatty.chat_template = CHATML
        assert chatty.decode(chat_prompt(chatty, self.item)) == (
            "<|im_start|>user\n4 + 5 - 2 = Answer with a number only.<|im_end|>\n<|im_start|>assistant\n"
        )

    @pytest.mark.skipif(not MODEL.exists(), reason="needs data/model: run `dvc repro fetch`")
    def test_the_models_own_template(self):
        real = load_tokenizer(MODEL)
        messages = [{"role": "user", "content": f"{self.item.question} {NUMBER}"}]
        text = real.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = chat_prompt(real, self.item)
        assert ids == real(text)["input_ids"]
        assert real.decode(ids) == text
        assert ids.count(real.convert_tokens_to_ids("<|im_start|>")) == 3
        assert len(ids) <= 50


def test_paper_prompts_are_the_papers():
    assert (
        TASKS["gsm_symbolic"].instruction
        == BOXED
        == ("Please reason step by step, and put your final answer within \\boxed{}.")
    )
