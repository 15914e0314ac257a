"""Teacher-forced readings, every metric by hand over a vocabulary of four, and against plain loops."""

import math

import pytest
import torch

from trimtab.errors import InputError
from trimtab.repetition import single_token as module
from trimtab.repetition.single_token import TRUNCATIONS, Truncation, single_token

ROWS = [torch.tensor([0, 1, 0, 3])]
PROBS = torch.tensor(
    [
        [0.1, 0.6, 0.2, 0.1],  # gold 1: predicted
        [0.3, 0.4, 0.2, 0.1],  # gold 0: second, the prediction 1 stood one before
        [0.5, 0.3, 0.15, 0.05],  # gold 3: last, the prediction 0 stood one and three before
        [0.25, 0.25, 0.25, 0.25],  # predicts beyond the row
    ]
)


def of(probs):
    return lambda row: probs.log()


@pytest.fixture
def small(monkeypatch):
    """Windows that a row of four tokens can fill."""
    monkeypatch.setattr(module, "WINDOWS", (1, 2, 3))


def test_likelihood_and_ranks(small):
    read = single_token(of(PROBS), ROWS)
    assert read.row_tokens == (3,)
    assert read.row_nats == (pytest.approx(-math.log(0.6 * 0.3 * 0.05)),)
    assert read.ppl == pytest.approx((0.6 * 0.3 * 0.05) ** (-1 / 3))
    assert read.acc == pytest.approx(1 / 3)
    assert read.mean_rank == pytest.approx((1 + 2 + 4) / 3)
    assert read.median_rank == 2
    assert read.hits_10 == 1
    assert read.uniq == 2, "1, 1 and 0 are predicted"
    assert read.human_uniq == 3


def test_hits_at_ten():
    logits = torch.arange(12.0).flip(0).expand(3, -1)  # token i has rank i + 1
    read = single_token(lambda row: logits, [torch.tensor([0, 9, 10])])
    assert read.hits_10 == 0.5
    assert read.median_rank == 10.5


def test_repetition_in_previous_gold_tokens(small):
    """Predictions 1, 1, 0 at places 1, 2, 3; gold 0 1 0 3."""
    read = single_token(of(PROBS), ROWS)
    # 1 after [0]: no. 1 after [0 1]: one before, and not gold. 0 after [0 1 0]: one before, and not gold.
    assert read.rep == {window: pytest.approx(2 / 3) for window in (1, 2, 3)}
    assert read.wrep == read.rep
    # Gold 0 at place 2 stood two before it; 1 and 3 are new.
    assert read.human_rep == {1: 0, 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 3)}
    assert read.average_rep == (pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 9))


def test_a_right_repetition_counts_for_rep_and_not_for_wrep(small):
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(4, -1)
    read = single_token(of(probs), [torch.tensor([0, 0, 1, 2])])  # predicted 0 0 0, right the first time
    assert read.rep == {1: pytest.approx(2 / 3), 2: 1, 3: 1}
    assert read.wrep == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: pytest.approx(2 / 3)}
    assert read.acc == pytest.approx(1 / 3)


def js(p):
    """Of p, all but p[gold] of it elsewhere, and one-hot gold, by the definition."""
    mean = (1 + p) / 2
    with_gold = 0 if p == 0 else p * math.log(p / mean)
    return 0.5 * (with_gold + (1 - p) * math.log(2)) + 0.5 * math.log(1 / mean)


def test_truncations():
    cuts = (
        Truncation("k=1", 1, None, 0.01),
        Truncation("k=2", 2, None, 0.01),
        Truncation("p=0.65", None, 0.65, 0.01),
        Truncation("p=1", None, None, 0.0),
    )
    read = single_token(of(PROBS), ROWS, cuts).truncated
    by_hand = {  # p[gold] and ||p||^2 at the three places
        "k=1": ([1, 0, 0], [1, 1, 1]),
        "k=2": ([0.6 / 0.8, 0.3 / 0.7, 0], [0.4 / 0.64, 0.25 / 0.49, 0.34 / 0.64]),
        # 0.6 alone does not reach 0.65; 0.4 + 0.3 and 0.5 + 0.3 do.
        "p=0.65": ([0.6 / 0.8, 0.3 / 0.7, 0], [0.4 / 0.64, 0.25 / 0.49, 0.34 / 0.64]),
        "p=1": ([0.6, 0.3, 0.05], [0.42, 0.3, 0.365]),
    }
    for cut in cuts:
        gold, square = by_hand[cut.name]
        found = read[cut.name]
        smoothed = [(p + cut.epsilon) / (1 + 4 * cut.epsilon) for p in gold]
        assert found.eps_ppl == pytest.approx(math.prod(smoothed) ** (-1 / 3), rel=1e-5)
        assert found.js == pytest.approx(sum(map(js, gold)) / 3, rel=1e-5)
        scores = [1 - (0.5 * s - p + 0.5) for p, s in zip(gold, square, strict=True)]
        assert found.sparsemax == pytest.approx(sum(scores) / 3, rel=1e-5)
        assert found.zero_share == pytest.approx(sum(p == 0 for p in gold) / 3)
    assert read["p=1"].eps_ppl == pytest.approx(single_token(of(PROBS), ROWS).ppl)


def test_the_ends_of_the_scores():
    sure = torch.tensor([[0.0, 200.0], [0.0, 200.0], [0.0, 200.0]])
    right = single_token(lambda row: sure, [torch.tensor([0, 1, 1])]).truncated["p=1"]
    assert (right.js, right.sparsemax, right.eps_ppl) == pytest.approx((0, 1, 1), abs=1e-6)
    wrong = single_token(lambda row: sure, [torch.tensor([1, 0, 0])]).truncated
    assert (wrong["k=1"].js, wrong["k=1"].sparsemax) == pytest.approx((math.log(2), 0), abs=1e-6)
    assert wrong["k=1"].eps_ppl == pytest.approx((1 + 2 * 2e-5) / 2e-5)
    assert wrong["p=1"].eps_ppl == pytest.approx(math.exp(200)), "fp32 would have cut it off"
    assert wrong["p=1"].zero_share == 0


def test_the_published_truncations():
    assert [cut.name for cut in TRUNCATIONS] == ["k=1", "k=10", "p=0.9", "p=1"]
    assert [cut.epsilon for cut in TRUNCATIONS] == [2e-5, 8e-6, 2e-6, 0]


def test_ties_go_to_the_lower_id_in_predictions_ranks_and_truncations():
    read = single_token(lambda row: torch.zeros(3, 4), [torch.tensor([0, 0, 1])])
    assert read.acc == 0.5
    assert read.mean_rank == 1.5
    assert read.truncated["k=1"].zero_share == 0.5
    assert read.uniq == 1


@pytest.mark.parametrize("head", [3, 50, 1024])
@pytest.mark.parametrize("places", [5, 64])
def test_it_is_the_plain_loop(head, places, monkeypatch):
    monkeypatch.setattr(module, "HEAD", head)
    monkeypatch.setattr(module, "PLACES", places)
    vocab, generator = 60, torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab, (length,), generator=generator) for length in (40, 2, 17)]
    logits = [torch.randn(len(row), vocab, generator=generator) * 2 for row in rows]
    cuts = (*TRUNCATIONS, Truncation("k=20", 20, None, 1e-6), Truncation("p=0.99", None, 0.99, 1e-6))
    waiting = iter(logits)
    read = single_token(lambda row: next(waiting), rows, cuts)

    ranks, predictions, kept = [], [], {cut.name: [] for cut in cuts}
    stood = {window: [0, 0, 0] for window in module.WINDOWS}
    nats = []
    for row, of_row in zip(rows, logits, strict=True):
        nats.append(0.0)
        for t in range(1, len(row)):
            p = of_row[t - 1].double().softmax(0)
            gold, order = int(row[t]), p.argsort(descending=True).tolist()
            nats[-1] -= float(p[gold].log())
            ranks.append(order.index(gold) + 1)
            predictions.append(order[0])
            for window, counts in stood.items():
                before = row[max(0, t - window) : t].tolist()
                counts[0] += order[0] in before
                counts[1] += order[0] in before and order[0] != gold
                counts[2] += gold in before
            for cut in cuts:
                keep, mass = [], 0.0
                for token in order:
                    if (cut.top_k is not None and len(keep) == cut.top_k) or (
                        cut.top_p is not None and mass >= cut.top_p
                    ):
                        break
                    keep.append(token)
                    mass += float(p[token])
                kept[cut.name].append(
                    (float(p[gold]) / mass if gold in keep else 0.0, float((p[keep] ** 2).sum()) / mass**2)
                )
    n = len(ranks)
    assert read.row_tokens == (39, 1, 16)
    assert read.row_nats == pytest.approx(nats, rel=1e-5)
    assert read.mean_rank == pytest.approx(sum(ranks) / n)
    assert read.uniq == len(set(predictions))
    for window, counts in stood.items():
        assert [read.rep[window] * n, read.wrep[window] * n, read.human_rep[window] * n] == pytest.approx(counts)
    for cut in cuts:
        found = read.truncated[cut.name]
        assert found.zero_share == pytest.approx(sum(p == 0 for p, _ in kept[cut.name]) / n)
        assert found.sparsemax == pytest.approx(sum(0.5 + p - s / 2 for p, s in kept[cut.name]) / n, rel=1e-4)
        assert found.js == pytest.approx(sum(js(p) for p, _ in kept[cut.name]) / n, rel=1e-4)


def test_rows_may_be_one_tensor_and_are_read_one_at_a_time():
    asked = []

    def logits(row):
        asked.append(tuple(row.shape))
        return torch.zeros(len(row), 4, dtype=torch.bfloat16)

    read = single_token(logits, torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert asked == [(3,), (3,)]
    assert read.ppl == pytest.approx(4)


def test_bad_input_is_refused():
    for rows in ([], [torch.tensor([1])]):
        with pytest.raises(InputError, match="Nothing is predicted"):
            single_token(of(PROBS), rows)
    with pytest.raises(InputError, match="A row of 3 tokens has logits of 4 places"):
        single_token(of(PROBS), [torch.tensor([0, 1, 2])])
    for given, says in (
        ((1, 0.9, 0.0), "both top_k and top_p"),
        ((0, None, 0.0), "keeps 0 tokens"),
        ((None, 1.5, 0.0), "top_p 1.5"),
        ((None, None, -1.0), "epsilon -1.0"),
    ):
        with pytest.raises(InputError, match=says):
            Truncation("odd", *given)
