"""What a gain must be measured against: a constant answer, random vectors, one forced first token."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.rl.policy import Policy
from trimtab.steering.experiment import Bench, Questions

FINALISTS = 8
"""Prefixes that are tried on all questions."""


def constant_answer(train: Questions, held_out: Questions) -> tuple[str, list[float]]:
    """(the commonest answer among training items, whether it is right on each held-out item): what a policy that has
    collapsed to one reply earns."""
    answer, _ = Counter(item.answer for item in train.items).most_common(1)[0]
    return answer, [held_out.judge(i, answer) for i in range(len(held_out.items))]


@torch.no_grad()
def first_tokens(
    policy: Policy, prompts: Sequence[Sequence[int]], n: int, barred: Collection[int] = (), batch: int = 64
) -> list[int]:
    """The n tokens with the highest mean probability of beginning a completion, `barred` ones left out: a digit, say,
    which would belong to the prompt and be missing from the answer."""
    total: Float[Tensor, " vocabulary"] | float = 0.0
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in some])
        attend = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some])
        positions = (attend.cumsum(1) - 1).clamp(min=0)
        hidden = policy.hidden(ids.to(policy.device), attend.to(policy.device), positions.to(policy.device))[:, -1]
        total = total + policy.logits(hidden).float().softmax(dim=1).sum(dim=0).cpu()
    assert isinstance(total, Tensor)
    total[list(barred)] = -1.0
    return total.topk(n).indices.tolist()


def best_prefix(bench: Bench, policy: Policy, questions: Questions, candidates: Sequence[int]) -> pl.DataFrame:
    """Accuracy of candidates as a forced first token: `token`, `text`, `questions` (how many were asked), `accuracy`.

    All are tried on a quarter of the questions, the best `FINALISTS` of them on all; these come first, the best
    at the top.
    """
    quarter = questions.sample(-(-len(questions.items) // 4))
    first = _with_prefixes(bench, policy, quarter, candidates)
    last = _with_prefixes(bench, policy, questions, first["token"].head(FINALISTS).to_list())
    return pl.concat([last, first.filter(~pl.col("token").is_in(last["token"].to_list()))])


def _with_prefixes(bench: Bench, policy: Policy, questions: Questions, candidates: Sequence[int]) -> pl.DataFrame:
    """All candidates before all questions at once, for a batch of few rows takes as long as one of many."""
    n = len(questions.items)
    prompts = [[*prompt, token] for token in candidates for prompt in questions.prompts]
    asked = replace(questions, items=[*questions.items] * len(candidates), prompts=prompts)
    right = torch.tensor(bench.right(policy, asked)).view(len(candidates), n).mean(dim=1).tolist()
    texts = [bench.decode([token]) for token in candidates]
    columns = {"token": list(candidates), "text": texts, "questions": n, "accuracy": right}
    table = pl.DataFrame(columns, schema_overrides={"token": pl.Int32, "questions": pl.Int32})
    return table.sort("accuracy", descending=True, maintain_order=True)


def greedily(bench: Bench) -> Bench:
    """The same experiment, read greedily alone."""
    return replace(bench, config=replace(bench.config, samples=0))
