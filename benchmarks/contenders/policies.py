"""Contenders of this project's environment: Trimtab's arms as the pipeline trains them, and generation alone."""

from collections.abc import Iterator, Sequence
from itertools import cycle

import nnsight  # noqa: F401  (the library imports it late: before memory is counted, as every other's)
import torch
from job import NEVER, TASK, Clock, Job, Questions
from transformers import PreTrainedModel

from trimtab.pretrained import load_tokenizer
from trimtab.rl.rollouts import Rollouts
from trimtab.rl.tasks import chat_prompt, open_task
from trimtab.rl.training import train
from trimtab.steering import experiment
from trimtab.steering.arms import Arm
from trimtab.steering.config import SteeringConfig


class Steering:
    """`rl.training.train` on what `Bench` makes of the arm; it says when it wants prompts and when rewards."""

    arm = "steering"

    def __init__(self, job: Job, questions: Questions, bare: list[PreTrainedModel]) -> None:
        bare.clear()  # the arm loads its own
        config = SteeringConfig(
            updates=job.updates, prompts=job.prompts, group=job.group, max_new_tokens=job.tokens, warm_up=0.0
        )
        tokenizer = load_tokenizer(job.model)
        prompts = [chat_prompt(tokenizer, item) for item in questions.items]
        asked = experiment.Questions(open_task(TASK), questions.items, prompts)
        self.job = job
        self.bench = experiment.Bench(Arm(self.arm), config, job.model, job.device, tokenizer, asked, {})
        self.policy = self.bench.build(job.seed).policy

    def fit(self, clock: Clock) -> None:
        right = self.bench.reward(self.job.seed)

        def reward(chosen: Sequence[int], drawn: Rollouts) -> torch.Tensor:
            clock.rolled_out()
            if self.job.fixed:
                rewards = torch.arange(self.job.group).remainder(2).float().repeat(self.job.prompts, 1)
            else:
                rewards = right(chosen, drawn)
            clock.judged(drawn.mask.sum(dim=2).flatten().tolist(), rewards.flatten().tolist())
            return rewards

        train(
            self.policy, Prompts(self.bench.questions.prompts, self.job.prompts, clock), reward, self.bench.config,
            learning_rate=self.job.rate, seed=self.job.seed, end=[NEVER] if self.job.fixed else self.bench.end,
        )  # fmt: skip
        clock.begin()  # and so the last has ended


class SteeringLast(Steering):
    arm = "steering-last"


class LoRA(Steering):
    arm = "lora-1"


class Full(Steering):
    arm = "full"


class Prompts(Sequence[list[int]]):
    """Prompts, of which an update asks for a batch at a time: its first request is where the update begins."""

    def __init__(self, prompts: Sequence[list[int]], batch: int, clock: Clock) -> None:
        self.prompts, self.batch, self.clock, self.asked = prompts, batch, clock, 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> list[int]:
        if self.asked % self.batch == 0:
            self.clock.begin()
        self.asked += 1
        return self.prompts[index]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.prompts)


class Generation:
    """transformers' `generate` of the same completions on the bare model, which trains nothing."""

    def __init__(self, job: Job, questions: Questions, bare: list[PreTrainedModel]) -> None:
        self.job, self.model = job, bare[0]
        tokenizer = load_tokenizer(job.model)
        self.batches = [[chat_prompt(tokenizer, questions.items[i]) for i in batch] for batch in questions.batches]
        self.end = tokenizer.eos_token_id

    def fit(self, clock: Clock) -> None:
        torch.manual_seed(self.job.seed)
        for prompts in cycle(self.batches):
            clock.begin()
            width = max(map(len, prompts))
            ids = torch.tensor([[self.end] * (width - len(prompt)) + prompt for prompt in prompts])
            attend = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            whole = self.model.generate(
                input_ids=ids.to(self.job.device), attention_mask=attend.to(self.job.device), pad_token_id=self.end,
                do_sample=True, temperature=1.0, top_k=0, num_return_sequences=self.job.group,
                max_new_tokens=self.job.tokens, min_new_tokens=self.job.tokens if self.job.fixed else None,
            )  # fmt: skip
            clock.rolled_out()
            ends = whole[:, width:] == self.end
            clock.judged(((ends.cumsum(dim=1) - ends.int()) == 0).sum(dim=1).tolist(), [])
