"""Every decoder against its definition: transformers' `generate`, enumeration, and loops without a cache."""

import copy
import itertools
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from trimtab.errors import InputError
from trimtab.interventions import steer, wrap
from trimtab.repetition import decoding
from trimtab.repetition.arms import PlainPolicy
from trimtab.repetition.decoding import FORMS, Decoder, continuations, together
from trimtab.repetition.dry import DRYProcessor, breakers_of
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import rollout

PREFIXES = torch.randint(2, 258, (5, 7), generator=torch.Generator().manual_seed(0))
NAMES = [
    "greedy",
    "beam-3",
    "top-k-8",
    "nucleus-0.9",
    "sampling",
    "penalty-1.3",
    "no-repeat-4",
    "dry",
    "contrastive-4-0.6",
]
END = 1


@pytest.fixture(scope="module")
def model(tiny_llama):
    """The tiny model, surer of itself: as it is, all tokens are about as likely."""
    sharp = copy.deepcopy(tiny_llama).requires_grad_(False)
    sharp.lm_head.weight.mul_(20)
    return sharp


class Plain(PlainPolicy):
    """Without nnsight, which takes most of a tiny model's time; `TestSteered` goes through it."""

    def hidden(self, input_ids, attention_mask, position_ids, cache=None):
        return self.view._module.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        ).last_hidden_state


@pytest.fixture(scope="module")
def policy(model, tokenizer):
    return Plain(wrap(model, tokenizer))


def decoded(policy, name, tokens=12, **options):
    return continuations(policy, PREFIXES, tokens, Decoder.of(name), **options)


def generated(model, tokens=12, **options):
    """By transformers, which is told of an end-of-sequence token that does not exist."""
    whole = model.generate(
        PREFIXES,
        attention_mask=torch.ones_like(PREFIXES),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=5000,
        pad_token_id=END,
        **options,
    )
    return whole[:, PREFIXES.shape[1] :]


@torch.no_grad()
def before_each(model, found):
    """[texts, time, vocab]: logits for each token of a continuation, from one pass over the whole."""
    whole = torch.cat([PREFIXES, found], dim=1)
    return model(whole).logits[:, PREFIXES.shape[1] - 1 : -1]


def repeats(ids, n=4):
    """Share of the n-grams that stood there before."""
    grams = list(zip(*(ids.tolist()[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams)


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_says_all(self, name):
        decoder = Decoder.of(name)
        numbers = [part for part in name.split("-") if part[0].isdigit()]
        assert decoder.name == name
        assert "-".join([decoder.kind, *numbers]) == name
        assert [f"{x:g}" for x in (decoder.count, decoder.value) if x != 1] == numbers
        assert decoder.samples == (name in ("top-k-8", "nucleus-0.9", "sampling"))

    def test_every_form_has_its_name_here(self):
        assert {Decoder.of(name).kind for name in NAMES} == {
            "-".join(p for p in f.split("-") if p.islower()) for f in FORMS
        }

    @pytest.mark.parametrize("name", ["Greedy", "beam", "top-k", "nucleus-", "dry-2", "contrastive-4", ""])
    def test_other_names_are_refused(self, name):
        with pytest.raises(
            InputError, match=r"is not a decoder: write one of greedy, beam-N, top-k-K, nucleus-P, .*contrastive-K-A"
        ):
            Decoder.of(name)

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("beam-0", "beam-1"), ("nucleus-0", "nucleus-0.001"), ("nucleus-1.1", "nucleus-1"),
            ("penalty-0.0", "penalty-0.001"), ("contrastive-4-1.5", "contrastive-4-1"), ("nucleus-0.90", "nucleus-0.9"),
            ("top-k-03", "top-k-3"), ("top-k-\u0663", "top-k-3"), ("beam-100000", "beam-256"), ("beam-2.5", "beam-2"),
            ("penalty-1.0", "penalty-1"), ("no-repeat--4", "no-repeat-1"), ("contrastive-04-0.6", "contrastive-4-0.6"),
        ],
    )  # fmt: skip
    def test_a_number_has_one_spelling_and_bounds(self, name, nearest):
        with pytest.raises(InputError, match=f"'{name}' is not a decoder: the nearest is {re.escape(nearest)}, of "):
            Decoder.of(name)
        assert Decoder.of(nearest).name == nearest

    @pytest.mark.parametrize(
        ("shape", "tokens", "batch"), [((0, 3), 1, 1), ((2, 0), 1, 1), ((2, 3), 0, 1), ((2, 3), 1, 0)]
    )
    def test_nothing_to_do_is_refused(self, policy, shape, tokens, batch):
        with pytest.raises(InputError, match="must not be empty or 0"):
            continuations(policy, torch.ones(shape, dtype=torch.long), tokens, Decoder.of("greedy"), batch=batch)


class TestEveryDecoder:
    @pytest.mark.parametrize("name", NAMES)
    def test_batch_and_neighbours_do_not_matter(self, policy, name):
        found = decoded(policy, name, seed=3)
        assert found.shape == (5, 12)
        assert torch.equal(found, decoded(policy, name, seed=3, batch=2))
        assert torch.equal(found[:1], continuations(policy, PREFIXES[:1], 12, Decoder.of(name), seed=3))
        assert torch.equal(found, decoded(policy, name, seed=4)) != Decoder.of(name).samples

    def test_the_end_is_a_token_like_any_other(self, model, tokenizer):
        eager = copy.deepcopy(model)
        eager.lm_head.weight[END] = 3 * eager.lm_head.weight[greedy_token(eager)]
        found = decoded(Plain(wrap(eager, tokenizer)), "greedy", tokens=10)
        row = found[0].tolist()
        assert END in row[:-1]
        assert torch.equal(before_each(eager, found).argmax(2), found)

    @pytest.mark.parametrize(
        "name", ["beam-1", "top-k-1", "nucleus-0.001", "penalty-1", "contrastive-1-0.6", "contrastive-4-0"]
    )
    def test_at_its_limit_it_is_greedy(self, policy, name):
        assert torch.equal(decoded(policy, name), decoded(policy, "greedy"))


def greedy_token(model):
    return int(model(PREFIXES[:1]).logits[0, -1].argmax())


def test_several_tasks_together_are_each_by_itself(policy):
    """In fp32, in batches that do not divide the rows, and with other prefixes for one."""
    alone = [name for name in NAMES if Decoder.of(name).alone]
    tasks = [(Decoder.of(name), PREFIXES) for name in alone] + [(Decoder.of("greedy"), PREFIXES[1:3] + 1)]
    *found, other = together(policy, tasks, 12, seed=3, batch=4, breakers=[9])
    for name, each in zip(alone, found, strict=True):
        assert torch.equal(each, decoded(policy, name, seed=3, breakers=[9])), name
    assert torch.equal(other, continuations(policy, PREFIXES[1:3] + 1, 12, Decoder.of("greedy")))


@pytest.mark.parametrize("names", [["greedy", "beam-3"], []])
def test_searches_are_not_for_together(policy, names):
    with pytest.raises(InputError, match="token by token"):
        together(policy, [(Decoder.of(name), PREFIXES) for name in names], 2)


@pytest.mark.parametrize(("name", "warper"), [("top-k-5", TopKLogitsWarper(5)), ("nucleus-0.7", TopPLogitsWarper(0.7))])
@pytest.mark.parametrize("head", [4, 1024])
def test_draws_are_from_what_transformers_leaves_in_its_proportions(name, warper, head, monkeypatch):
    """Also where the nucleus is larger than the head that is looked at first."""
    monkeypatch.setattr(decoding, "HEAD", head)
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    wanted = warper(None, logits.clone()).softmax(dim=1)[0]
    generator = torch.Generator().manual_seed(6)
    rows = 4000
    drawn = decoding._drawn(logits.expand(rows, -1), Decoder.of(name), [generator] * rows)
    share = torch.bincount(drawn[:, 0], minlength=40) / rows
    assert set(drawn[:, 0].tolist()) == set(wanted.nonzero()[:, 0].tolist())
    assert (share - wanted).abs().max() < 0.03


class TestLikeliest:
    def test_greedy_is_generate_and_the_rollouts(self, model, policy):
        found = decoded(policy, "greedy", tokens=20)
        assert torch.equal(found, generated(model, tokens=20))
        rolled = rollout(policy, PREFIXES.tolist(), group=1, max_new_tokens=20, temperature=0.0, end=[])
        assert torch.equal(found, rolled.completions[:, 0])

    @pytest.mark.parametrize("width", [2, 5])
    def test_beam_is_generates(self, model, policy, width):
        found = decoded(policy, f"beam-{width}")
        assert torch.equal(found, generated(model, num_beams=width))
        assert not torch.equal(found, decoded(policy, "greedy"))

    def test_a_wide_beam_finds_the_likeliest_of_all_sequences(self, tokenizer):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        small = LlamaForCausalLM(config).eval().requires_grad_(False)
        prefixes, tokens = torch.randint(0, 5, (4, 3)), 4
        every = torch.tensor(list(itertools.product(range(5), repeat=tokens)))
        policy = Plain(wrap(small, tokenizer))
        found, narrow = (continuations(policy, prefixes, tokens, Decoder.of(f"beam-{n}")) for n in (5**3, 1))
        for prefix, best in zip(prefixes, found, strict=True):
            whole = torch.cat([prefix.expand(len(every), -1), every], dim=1)
            log_probs = small(whole).logits[:, 2:-1].log_softmax(2).gather(2, every[:, :, None]).sum((1, 2))
            assert torch.equal(best, every[log_probs.argmax()])
        assert not torch.equal(found, narrow), "greedy should miss one of them"


class TestDrawn:
    def test_only_from_the_likeliest(self, model, policy):
        found = decoded(policy, "top-k-8")
        least = before_each(model, found).topk(8).values[:, :, -1:]
        logits = before_each(model, found).gather(2, found[:, :, None])
        assert (logits >= least - 1e-4).all()
        assert (logits < least + 1).any(), "the least likely of them come too"

    def test_only_from_the_nucleus(self, model, policy):
        found = decoded(policy, "nucleus-0.7")
        probs = before_each(model, found).softmax(2)
        own = probs.gather(2, found[:, :, None])
        likelier = torch.where(probs > own, probs, 0).sum(2)
        assert (likelier < 0.7 + 1e-5).all()
        assert (likelier > 0.5).any()
        everything = decoded(policy, "sampling")
        probs = before_each(model, everything).softmax(2)
        own = probs.gather(2, everything[:, :, None])
        assert (torch.where(probs > own, probs, 0).sum(2) > 0.7).any()

    def test_texts_of_one_prefix_differ(self, policy):
        found = continuations(policy, PREFIXES[:1].expand(6, -1), 8, Decoder.of("sampling"))
        assert len({tuple(row) for row in found.tolist()}) == 6


class TestPenalties:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("penalty-1.3", {"repetition_penalty": 1.3}), ("no-repeat-4", {"no_repeat_ngram_size": 4})],
    )
    def test_as_in_generate(self, model, policy, name, options):
        found = decoded(policy, name, tokens=40)
        assert torch.equal(found, generated(model, tokens=40, **options))
        assert not torch.equal(found, decoded(policy, "greedy", tokens=40))

    def test_no_four_tokens_come_twice(self, policy):
        assert max(map(repeats, decoded(policy, "greedy", tokens=40))) > 0.3
        assert max(map(repeats, torch.cat([PREFIXES, decoded(policy, "no-repeat-4", tokens=40)], dim=1))) == 0

    @pytest.mark.parametrize(
        ("ids", "breakers", "expected"),
        [
            ([1, 2, 3, 9, 1, 2, 3], [], {9: 0.8 * 1.75}),
            ([2, 3, 9, 1, 2, 3], [], {9: 0.8}),
            ([3, 9, 1, 2, 3], [], {}),
            ([1, 2, 3, 9, 1, 2, 3], [1], {9: 0.8}),
            ([1, 2, 3, 9, 1, 2, 3], [2], {}),
            ([1, 2, 3, 9, 1, 2, 3], [3], {}),
            ([1, 2, 3, 9, 1, 2, 3], [9], {}),
            ([2, 3, 9, 1, 2, 3, 9, 4, 1, 2, 3], [], {9: 0.8 * 1.75}),
            ([2, 3, 8, 1, 2, 3, 9, 4, 1, 2, 3], [], {8: 0.8, 9: 0.8 * 1.75}),
            ([5, 5, 5, 5], [], {5: 0.8 * 1.75}),
            ([5] * 80, [], {5: 0.8 * 1.75**48}),
            ([5], [], {}),
        ],
    )
    def test_dry_by_hand(self, ids, breakers, expected):
        scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
        penalty = scores - DRYProcessor(breakers)(torch.tensor([ids]), scores)
        wanted = torch.zeros(1, 10)
        for token, value in expected.items():
            wanted[0, token] = value
        torch.testing.assert_close(penalty, wanted)

    def test_dry_is_its_definition_row_by_row(self):
        ids = torch.randint(0, 3, (16, 40), generator=torch.Generator().manual_seed(5))
        found = -DRYProcessor([2])(ids, torch.zeros(16, 4))
        for row, penalties in zip(ids.tolist(), found, strict=True):
            for token in range(4):
                longest = 0
                for at in (i for i in range(1, 40) if row[i] == token != 2):
                    m = 0
                    while m < at and row[at - 1 - m] == row[-1 - m] != 2:
                        m += 1
                    longest = max(longest, m)
                assert penalties[token].item() == pytest.approx(0.8 * 1.75 ** (longest - 2) if longest > 1 else 0)

    def test_dry_ends_a_loop_and_breakers_spare_it(self, policy):
        greedy, dry = decoded(policy, "greedy", tokens=50), decoded(policy, "dry", tokens=50)
        worst = int(torch.tensor([repeats(row) for row in greedy]).argmax())
        assert repeats(greedy[worst]) > 0.5
        assert repeats(dry[worst]) < 0.5 * repeats(greedy[worst])
        assert torch.equal(decoded(policy, "dry", tokens=50, breakers=range(258)), greedy)

    def test_breakers_are_the_tokens_that_hold_one(self, tokenizer):
        assert sorted(tokenizer.decode([token]) for token in breakers_of(tokenizer)) == ["\n", '"', "*", ":"]


@torch.no_grad()
def contrastive(model, prefix, tokens, k, alpha):
    """By its definition, whole sequences in every pass."""
    ids = prefix[None]
    for _ in range(tokens):
        probs, candidates = model(ids).logits[0, -1].softmax(0).topk(k)
        states = model.model(torch.cat([ids.expand(k, -1), candidates[:, None]], dim=1)).last_hidden_state
        cosines = torch.cosine_similarity(states[:, -1:], states[:, :-1], dim=2)
        best = ((1 - alpha) * probs - alpha * cosines.amax(dim=1)).argmax()
        ids = torch.cat([ids, candidates[best][None, None]], dim=1)
    return ids[0, len(prefix) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (3, 0.2)])
def test_contrastive_search_is_its_definition(model, policy, k, alpha):
    found = decoded(policy, f"contrastive-{k}-{alpha}")
    for prefix, ids in zip(PREFIXES, found, strict=True):
        assert torch.equal(ids, contrastive(model, prefix, 12, k, alpha))
    assert not torch.equal(found, decoded(policy, "greedy"))


class TestSteered:
    @pytest.fixture
    def steered(self, model, tokenizer):
        vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        wrapped = wrap(model, tokenizer)
        return Policy(steer(wrapped, [0, 2], lambda: vectors), {}, wrapped)

    def test_greedy_is_a_loop_without_a_cache(self, policy, steered):
        ids = PREFIXES
        for _ in range(8):
            positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
            with torch.no_grad():
                hidden = steered.hidden(ids, torch.ones_like(ids), positions)
                ids = torch.cat([ids, steered.logits(hidden[:, -1]).argmax(1, keepdim=True)], dim=1)
        found = decoded(steered, "greedy", tokens=8)
        assert torch.equal(found, ids[:, PREFIXES.shape[1] :])
        assert not torch.equal(found, decoded(policy, "greedy", tokens=8))

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_every_decoder_follows_the_vectors(self, policy, steered, name):
        assert not torch.equal(decoded(steered, name, tokens=8), decoded(policy, name, tokens=8))
