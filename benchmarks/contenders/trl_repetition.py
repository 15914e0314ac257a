"""TRL's GRPO with its reward against repetition, driven through its own `train()`; nothing is logged or saved.

Weights are fp32 and autocast makes them bf16. What is set differently from TRL's defaults is set so that both sides do
the same: see `trl_trainers.py`. GRPO needs completions that differ: they are drawn at temperature 1, all of one group,
so that the baseline is the batch's mean reward as ours is. `min_new_tokens` bans the end-of-sequence token, so that all
have their full length.
"""

import tempfile
from typing import Any

from against_repetition import DECAY, MAX_GRAD_NORM, Batches, Job, N
from datasets import Dataset
from job import Clock
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_repetition_penalty_reward
from trl_trainers import Turns, time_rollouts

from trimtab.pretrained import load_tokenizer

UPDATES = 10_000
"""What the trainer believes it will take."""


class GRPO:
    """Every weight trained; a batch's first prefix, and as many completions of it as others have prefixes."""

    def __init__(self, job: Job, batches: Batches, bare: list[PreTrainedModel]) -> None:
        self.clock: Clock | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.penalty = get_repetition_penalty_reward(ngram_size=N, max_penalty=-1)
        arguments = GRPOConfig(
            output_dir=self.folder.name, max_steps=UPDATES, per_device_train_batch_size=job.prefixes,
            num_generations=job.prefixes, max_completion_length=job.tokens, temperature=1.0, beta=0.0,
            generation_kwargs={"min_new_tokens": job.tokens}, shuffle_dataset=False, loss_type="dapo",
            scale_rewards="none", learning_rate=job.rate, lr_scheduler_type="constant", weight_decay=DECAY,
            max_grad_norm=MAX_GRAD_NORM, gradient_checkpointing=False, bf16=True, use_cpu=job.device == "cpu",
            dataloader_pin_memory=False, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        tokenizer = load_tokenizer(job.model)
        texts = [tokenizer.decode(batch[0]) for batch in batches]
        assert tokenizer(text=texts)["input_ids"] == [batch[0] for batch in batches]  # as TRL tokenizes them
        self.driven = GRPOTrainer(
            model=bare[0].float(), reward_funcs=self.reward, args=arguments, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[Turns(self)],
        )  # fmt: skip
        time_rollouts(self)

    def fit(self, clock: Clock) -> None:
        self.clock = clock
        self.driven.train()

    def reward(self, completion_ids: list[list[int]], **given: Any) -> list[float]:
        """TRL's, passed on to the clock as 1 - seq-rep-n."""
        penalties = self.penalty(completion_ids=completion_ids, **given)
        self.clock.judged(list(map(len, completion_ids)), [1 + penalty for penalty in penalties])
        return penalties
