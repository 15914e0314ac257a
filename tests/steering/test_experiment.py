"""An arm's experiment from items to answers, the controls, what layers and latents contribute, the comparison."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from trimtab.errors import InputError
from trimtab.interventions import wrap
from trimtab.pretrained import load_model
from trimtab.rl.evaluation import answers
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import rollout
from trimtab.rl.tasks import Item, Task
from trimtab.steering import comparison, contributions, controls, readings
from trimtab.steering.config import SteeringConfig
from trimtab.steering.experiment import Bench, accuracy_table, save, sweep
from trimtab.steering.export import load_vectors
from trimtab.steering.vectors import SteeringVectors

CONFIG = SteeringConfig(
    task="sum", other_tasks=("product",), train_items=12, test_items=10, other_items=4, samples=2,
    learning_rates=(0.01, 0.1), sweep_updates=2, seeds=(0, 1), updates=3, prompts=3, group=4, max_new_tokens=3,
    read_tokens=3, dtype="float32",
)  # fmt: skip


ENDS = list(range(0, 258, 2))


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """Half of the vocabulary ends a reply: a random model would never find the one token that does."""
    monkeypatch.setattr(Bench, "end", ENDS)


@pytest.fixture(scope="module")
def bench(model_folder):
    return Bench.of("steering", CONFIG, str(model_folder), "cpu")


@pytest.fixture(scope="module")
def wrapped(model_folder, tokenizer):
    return wrap(load_model(model_folder), tokenizer)


class Obliging(Task):
    """A task which any reply answers that holds an `a`: something a random model can do now and then."""

    def _ordered(self, split, order):
        raise NotImplementedError

    def reward(self, completion: str, item: Item) -> float:
        return float("a" in completion)


def test_items_of_training_and_test_share_no_subject(bench):
    train = {item.subject for item in bench.questions.items}
    held_out = {item.subject for item in bench.held_out["sum"].items}
    assert not train & held_out
    assert len(bench.held_out["product"].prompts) == 4


@pytest.fixture
def obliging(bench):
    """The same experiment with rewards that a random model earns now and then, and three rates."""
    config = replace(CONFIG, learning_rates=(0.01, 0.1, 1.0), max_new_tokens=8, group=8, updates=6, sweep_updates=2)
    questions = replace(bench.questions, task=Obliging(name="obliging", instruction=""))
    return replace(bench, config=config, questions=questions)


class TestSweep:
    def test_two_rates_go_on_to_the_end(self, obliging, tmp_path):
        swept = sweep(obliging, tmp_path)
        assert list(swept.short) == [0.01, 0.1, 1.0]
        assert len(swept.whole) == 2
        assert min(swept.short[rate] for rate in swept.whole) >= min(swept.short.values())
        alone = {rate: obliging.train(rate, 0) for rate in swept.short}
        for rate, run in alone.items():
            rewards = [update.reward for update in run.history]
            assert swept.short[rate] == pytest.approx(rewards[1])
            assert swept.whole.get(rate, np.mean(rewards[3:])) == pytest.approx(np.mean(rewards[3:]))
        assert len(swept.run.history) == 6
        assert torch.equal(swept.run.built.vectors.weight, alone[swept.best].built.vectors.weight)
        assert swept.table["whole"].null_count() == 1

    def test_a_policy_that_is_never_right_is_given_up(self, obliging, tmp_path):
        never = replace(obliging.questions, task=Never(name="never", instruction=""))
        hopeless = replace(obliging, config=replace(obliging.config, sweep_updates=5), questions=never)
        swept = sweep(hopeless, tmp_path / "never")
        assert set(swept.short.values()) == {0.0}
        assert len(swept.run.history) == 6, "the best of nothing is run to its end"
        seen = []
        hopeless.train(0.01, 0, tmp_path / "one", worth=lambda history: seen.append(len(history)) or len(history) < 3)
        assert seen == [1, 2, 3]
        assert not (tmp_path / "one").exists()

    def test_it_goes_on_where_it_was_interrupted(self, obliging, tmp_path, monkeypatch):
        whole, real, taken = sweep(obliging, tmp_path / "whole"), Bench.train, []

        def failing(self, rate, *rest, **options):
            taken.append(rate)
            if len(taken) == 3:
                raise KeyboardInterrupt
            return real(self, rate, *rest, **options)

        monkeypatch.setattr(Bench, "train", failing)
        with pytest.raises(KeyboardInterrupt):
            sweep(obliging, tmp_path / "cut")
        again = sweep(obliging, tmp_path / "cut")
        assert taken[:4] == [0.01, 0.1, 1.0, 1.0], "rates that were tried are not tried again"
        assert (again.short, again.whole) == (whole.short, whole.whole)
        assert torch.equal(again.run.built.vectors.weight, whole.run.built.vectors.weight)


class Never(Obliging):
    """A task which no reply answers."""

    def reward(self, completion: str, item: Item) -> float:
        return 0.0


class Generous(Obliging):
    """A task which any reply answers."""

    def reward(self, completion: str, item: Item) -> float:
        return 1.0


def test_a_reply_that_was_cut_off_is_never_right(bench):
    generous = replace(bench, questions=replace(bench.questions, task=Generous(name="generous", instruction="")))
    policy, chosen = bench.build().policy, list(range(6))
    limits = {"max_new_tokens": 8, "temperature": 1.0, "end": ENDS[::8]}
    prompts = [bench.questions.prompts[i] for i in chosen]
    drawn = rollout(policy, prompts, group=16, generator=torch.Generator().manual_seed(0), **limits)
    assert 0 < drawn.finished.float().mean() < 1
    assert torch.equal(generous.reward(0)(chosen, drawn), drawn.finished.float())
    judged = answers(policy, prompts, lambda i, text: 1.0, bench.decode, samples=4, seed=0, **limits)
    assert judged["correct"].to_list() == judged["finished"].cast(pl.Float64).to_list()


def test_answers_hold_every_item_and_sample(bench):
    answers = bench.answers(bench.build().policy, seed=1)
    counts = dict(answers.group_by("task").len().iter_rows())
    assert counts == {"sum": 10 * 3, "product": 4}
    assert answers["seed"].unique().to_list() == [1]
    subjects = [item.subject for item in bench.held_out["sum"].items]
    assert answers.filter(pl.col("task") == "sum", sample=0)["subject"].to_list() == subjects
    table = accuracy_table(answers)
    assert table["task"].to_list() == ["sum", "product"]
    assert {"greedy", "mean", "pass@2", "greedy_exact"} <= set(table.columns)


def test_a_random_reward_pays_as_often_but_for_nothing(bench):
    coin = Bench.of("random-reward", CONFIG, bench.folder, "cpu")
    coin = replace(coin, questions=replace(coin.questions, task=Obliging(name="obliging", instruction="")))
    honest = replace(bench, questions=coin.questions)
    policy, chosen = bench.build().policy, list(range(12))
    drawn = rollout(
        policy, [bench.questions.prompts[i] for i in chosen], group=100, max_new_tokens=8, temperature=1.0,
        end=ENDS[::8], generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    right, tossed = honest.reward(0)(chosen, drawn), coin.reward(0)(chosen, drawn)
    assert 0 < right.mean() < 1
    assert right.mean() == tossed.mean()
    assert abs(np.corrcoef(right.flatten(), tossed.flatten())[0, 1]) < 0.2
    assert torch.equal(tossed, coin.reward(0)(chosen, drawn)), "a resumed run must toss the same coins"
    assert not torch.equal(tossed, coin.reward(1)(chosen, drawn))


def test_what_was_trained_is_saved_and_read_back(bench, tmp_path):
    run = bench.train(0.1, 0)
    save(tmp_path, bench, {0: run})
    loaded = load_vectors(tmp_path / "seed-0/vectors.safetensors", bench.folder)
    assert torch.equal(loaded.vectors(), run.built.vectors.vectors())
    lora = Bench.of("lora-1", CONFIG, bench.folder, "cpu")
    save(tmp_path / "lora", lora, {3: lora.train(0.1, 3)})
    assert (tmp_path / "lora/seed-3/adapter.safetensors").is_file()


class TestControls:
    def test_the_constant_answer_is_the_commonest_of_training(self, bench):
        answer, right = controls.constant_answer(bench.questions, bench.held_out["sum"])
        given = [item.answer for item in bench.questions.items]
        assert given.count(answer) == max(map(given.count, given))
        assert right == [float(item.answer == answer) for item in bench.held_out["sum"].items]

    def test_first_tokens_are_the_likeliest(self, bench, wrapped):
        policy = Policy(wrapped, {})
        total = 0
        with torch.no_grad():
            for prompt in bench.questions.prompts:
                total = total + wrapped._module(torch.tensor([prompt])).logits[0, -1].softmax(0)
        assert controls.first_tokens(policy, bench.questions.prompts, 3, batch=5) == total.topk(3).indices.tolist()

    def test_a_forced_prefix_is_part_of_the_prompt(self, bench, wrapped):
        policy = Policy(wrapped, {})
        questions = replace(bench.held_out["sum"], task=Obliging(name="obliging", instruction=""))
        token = int(bench.tokenizer("a")["input_ids"][-1])
        candidates = [token, *range(50, 50 + controls.FINALISTS)]
        ranking = controls.best_prefix(bench, policy, questions, candidates)
        assert sorted(ranking["token"]) == sorted(candidates)
        whole, first = ranking.head(controls.FINALISTS), ranking.tail(1)
        assert whole["accuracy"].is_sorted(descending=True)
        assert whole["questions"].unique().to_list() == [len(questions.items)]
        assert first["questions"].item() == -(-len(questions.items) // 4)
        for tried, text, number, accuracy in ranking.iter_rows():
            assert text == bench.decode([tried])
            some = questions.sample(number)
            prompts = [[*prompt, tried] for prompt in some.prompts]
            by_hand = bench.right(policy, replace(some, prompts=prompts))
            assert accuracy == pytest.approx(sum(by_hand) / len(by_hand))


class TestContributions:
    @pytest.fixture
    def vectors(self):
        made = SteeringVectors([0, 1, 2], 16)
        with torch.no_grad():
            made.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(3)
        return made

    @pytest.fixture
    def obliging(self, bench):
        return replace(
            bench, held_out={"sum": replace(bench.held_out["sum"], task=Obliging(name="obliging", instruction=""))}
        )

    def test_by_layer_leaves_out_and_leaves_in(self, obliging, wrapped, vectors):
        questions = obliging.sample(6)
        assert len(questions.items) == len(questions.prompts) == 6
        table = contributions.by_layer(obliging, wrapped, vectors, questions)
        assert table["layer"].to_list() == [0, 1, 2]
        assert contributions.by_layer(obliging, wrapped, vectors, questions, 2).equals(table[::2])
        for layer, alone, without in table.iter_rows():
            only = SteeringVectors([layer], 16)
            rest = SteeringVectors([i for i in range(3) if i != layer], 16)
            with torch.no_grad():
                only.weight.copy_(vectors.weight[layer])
                rest.weight.copy_(vectors.weight[[i for i in range(3) if i != layer]])
            for made, found in ((only, alone), (rest, without)):
                by_hand = obliging.right(Policy(made.applied_to(wrapped), {}), questions)
                assert found == pytest.approx(sum(by_hand) / 6)

    def test_a_vector_of_two_latents_is_carried_by_two(self, obliging, wrapped):
        directions = torch.nn.functional.normalize(
            torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), dim=1
        )
        single = SteeringVectors([1], 16)
        with torch.no_grad():
            single.weight.copy_(8 * directions[3] + 5 * directions[7])
        kept = contributions.by_latents(
            obliging, wrapped, {0: single}, directions, [1, 2, 16], obliging.sample(6), seed=0
        )
        rows = {(name, m): explained for name, m, _, explained in kept.table.iter_rows()}
        assert rows[contributions.LATENTS, 2] == pytest.approx(1, abs=1e-4)
        assert rows[contributions.RANDOM, 2] < 0.99
        of = kept.right.arms
        assert np.array_equal(of[contributions.rebuilt(contributions.LATENTS, 16)], of[contributions.VECTOR])


class TestComparison:
    def answers(self, arms):
        """Two wordings of each of four subjects; arms: {name: rows of right answers, one for each seed}."""
        rows = [
            (arm, item, 0, "", float(right), 1, True, f"subject {item // 2}", "sum", seed, 0.0)
            for arm, seeds in arms.items()
            for seed, answers in enumerate(seeds)
            for item, right in enumerate(answers)
        ]
        columns = ["arm", "item", "sample", "completion", "correct", "length", "finished", "subject", "task", "seed"]
        return pl.DataFrame(rows, schema=[*columns, "exact"], orient="row")

    def test_gains_and_shares_by_hand(self):
        arms = {
            "base": [[1, 0, 0, 0, 0, 0, 0, 0]],
            "steering": [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]],
            "full": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
        }
        right = comparison.Correct.of(self.answers(arms), "sum")
        assert (right.seeds, right.items, right.groups) == (2, 8, 4)
        ones = np.ones(4)
        assert right.gain("steering", 0, ones) == pytest.approx(3 / 8)
        # Gains 3/8 and 5/8 against 5/8 and 7/8: a ratio of 2/3, whose terms fall by what the other's gain adds.
        assert right.share("steering", "full", 0, ones) == pytest.approx(2 / 3 + (3 - 2 / 3 * 5) / 6)
        assert right.share("steering", "full", 1, ones) == pytest.approx(2 / 3 + (5 - 2 / 3 * 7) / 6)
        assert [right.share("full", "full", s, ones) for s in (0, 1)] == pytest.approx([1, 1])
        # A bootstrap sample that drew the second subject alone.
        assert right.gain("steering", 0, np.array([0.0, 4.0, 0.0, 0.0])) == pytest.approx(1.0)
        assert right.ratio(["base", "steering"], "full")[0] == pytest.approx(2 / 3)
        assert right.ratio(["full"], "full") == pytest.approx((1, 1, 1))
        assert right.ratio(["full"], "full", less="steering")[0] == pytest.approx(1 / 3)
        assert right.interval("steering")[0] == pytest.approx(1 / 2)
        assert right.ratio(["full"], "base")[1:] == (-np.inf, np.inf), "of no gain there are no shares"
        assert right.accuracy("full") == pytest.approx(14 / 16)

    def test_arms_that_were_read_otherwise_are_refused(self):
        with pytest.raises(InputError, match="was not read with the seeds"):
            comparison.Correct.of(self.answers({"base": [[1, 0]], "steering": [[1]], "full": [[1, 1]] * 3}), "sum")

    def test_needed_arms(self):
        comparison.check_arms(["steering", "steering-last", "full", "lora-1"])
        with pytest.raises(InputError, match="full is missing"):
            comparison.check_arms(["steering", "steering-last", "lora-1"])


class TestReadings:
    def test_last_residuals_are_the_models(self, wrapped):
        prompts = [[5, 6, 7], [9, 10]]
        found = readings.last_residuals(wrapped, prompts)
        for row, prompt in zip(found, prompts, strict=True):
            with torch.no_grad():
                hidden = wrapped._module.model(torch.tensor([prompt])).last_hidden_state[0, -1]
            torch.testing.assert_close(wrapped._module.model.norm(row), hidden)

    def test_task_tokens(self, tokenizer):
        ids = readings.task_tokens(tokenizer, "07")
        assert sorted(tokenizer.decode([i]) for i in ids) == ["0", "7"]

    def test_random_sets_keep_norms_and_agreement_is_of_pairs(self):
        vectors = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
        drawn = readings.random_sets(vectors, 3, 0)
        torch.testing.assert_close(drawn.norm(dim=2)[0], vectors.norm(dim=2)[0])
        torch.testing.assert_close(drawn.norm(dim=2)[1], vectors.norm(dim=2)[1])
        agreement = torch.tensor([[[1.0, 0.2], [0.2, 1.0]], [[1.0, 0.6], [0.6, 1.0]]])
        assert readings.agreements(agreement) == pytest.approx([0.4])
        assert readings.agreements(agreement[:, :1, :1]) == [0.0]
        three = torch.tensor([[[1.0, 0.1, 0.3], [0.1, 1.0, 0.8], [0.3, 0.8, 1.0]]])
        # Left out by turns: cosines 0.8, 0.3, 0.1, whose mean is 0.4.
        assert readings.agreements(three) == pytest.approx([3 * 0.4 - 2 * rest for rest in (0.8, 0.3, 0.1)])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"learning_rates": ()}, "learning_rates"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"dtype": "int8"}, "one of bfloat16, float32"),
        ({"samples": -1}, "`samples` must be a whole number, at least 0"),
        ({"group": 1}, "at least 2"),
    ],
)
def test_bad_configurations_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        replace(CONFIG, **wrong)
