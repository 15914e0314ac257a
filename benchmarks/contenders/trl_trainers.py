"""TRL's trainers, each driven through its own `train()`; nothing is logged or saved.

What is trained is fp32, and the model computes in bf16, as ours does. Quirks of TRL 1.16 that matter here:
- Left as they are, trainers turn gradient checkpointing on, load a reference model (RLOO's beta is 0.05), let the
  learning rate fall to zero and have groups of 2 (RLOO) or 8: all set below, so that both sides do the same.
- RLOOTrainer runs the model once more over all completions, for `old_logps`, though it takes one step on each batch;
  GRPOTrainer leaves that out where generation and steps are aligned. With `loss_type="dapo"` and no division by the
  deviation GRPO's loss is ours but for the factor G / (G - 1) of the leave-one-out mean.
- The head runs on completion tokens only where there is Triton, that is on a GPU; on a CPU on the prompts' as well, and
  `FewerLogits` is GRPO with that put right.
- Completions reach a reward function decoded without special tokens; the strict reward reads `completion_ids` instead.
"""

import tempfile
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import trl.trainer.utils
from datasets import Dataset
from job import TASK, Clock, Job, Questions
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trimtab.pretrained import load_tokenizer
from trimtab.rl.tasks import Item, chat_prompt, open_task


class RLOO:
    """`RLOOTrainer` with a trainable bias on every down projection, and nothing else."""

    trainer, config = RLOOTrainer, RLOOConfig
    options: ClassVar[dict[str, Any]] = {}
    amp = False
    """Whether weights are fp32 and autocast makes them bf16."""

    def __init__(self, job: Job, questions: Questions, bare: list[PreTrainedModel]) -> None:
        self.job, self.items, self.task = job, questions.items, open_task(TASK)
        self.tokenizer = load_tokenizer(job.model)
        self.clock: Clock | None = None
        self.folder = tempfile.TemporaryDirectory()
        order = [i for batch in questions.batches for i in batch]
        prompts = [chat_prompt(self.tokenizer, self.items[i]) for i in order]
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        assert self.tokenizer(text=texts)["input_ids"] == prompts  # as TRL tokenizes them
        arguments = self.config(
            output_dir=self.folder.name, max_steps=job.updates, per_device_train_batch_size=job.prompts * job.group,
            num_generations=job.group, max_completion_length=job.tokens, temperature=1.0, beta=0.0,
            generation_kwargs={"min_new_tokens": job.tokens} if job.fixed else None, shuffle_dataset=False,
            learning_rate=job.rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            gradient_checkpointing=False, bf16=self.amp, use_cpu=job.device == "cpu", dataloader_pin_memory=False,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=job.seed, **self.options,
        )  # fmt: skip
        self.driven = self.trainer(
            model=self.adapt(bare[0]), reward_funcs=self.reward, args=arguments, processing_class=self.tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts, "item": order}), callbacks=[Turns(self)],
            **self.adapter(),
        )  # fmt: skip
        time_rollouts(self)

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """What is trained, in the model."""
        model.requires_grad_(False)
        for block in model.model.layers:
            block.mlp.down_proj.__class__ = Biased
            block.mlp.down_proj.bias = nn.Parameter(torch.zeros(model.config.hidden_size, device=model.device))
        return model

    def adapter(self) -> dict[str, Any]:
        """What is trained, as an argument of the trainer."""
        return {}

    def fit(self, clock: Clock) -> None:
        self.clock = clock
        self.driven.train()

    def reward(self, prompts: list[Any], completion_ids: list[list[int]], item: list[int], **_: Any) -> list[float]:
        """As ours: by `Task.reward`, and nothing for a completion that was cut off; the end-of-sequence token is no
        part of an answer."""
        if self.job.fixed:
            rewards = [float(row % self.job.group % 2) for row in range(len(prompts))]
        else:
            rewards = [self.judge(ids, self.items[i]) for ids, i in zip(completion_ids, item, strict=True)]
        self.clock.judged(list(map(len, completion_ids)), rewards)
        return rewards

    def judge(self, ids: list[int], item: Item) -> float:
        if ids[-1] != self.tokenizer.eos_token_id:
            return 0.0
        return self.task.reward(self.tokenizer.decode(ids[:-1], skip_special_tokens=False), item)


def time_rollouts(contender: Any) -> None:
    """Have the trainer tell the clock where its rollouts end."""
    generate = contender.driven._generate

    def timed(prompts: list[Any]) -> Any:
        generated = generate(prompts)
        contender.clock.rolled_out()
        return generated

    contender.driven._generate = timed


class Biased(nn.Linear):
    """A bf16 product with an fp32 bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class GRPO(RLOO):
    """`GRPOTrainer` with the same biases."""

    trainer, config = GRPOTrainer, GRPOConfig
    options: ClassVar[dict[str, Any]] = {"loss_type": "dapo", "scale_rewards": "none"}


class FewerLogits(GRPO):
    """GRPO with the head on completion tokens only."""

    def __init__(self, job: Job, questions: Questions, bare: list[PreTrainedModel]) -> None:
        trl.trainer.utils._use_triton = lambda device: True  # here it says no more than that
        super().__init__(job, questions, bare)


class LoRA(RLOO):
    """`RLOOTrainer` with PEFT's LoRA of rank 1 on every down projection."""

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def adapter(self) -> dict[str, Any]:
        return {"peft_config": LoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, target_modules=["down_proj"])}


class Full(RLOO):
    """`RLOOTrainer` with every weight trained, in fp32 under autocast."""

    amp = True

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.float()


class Turns(TrainerCallback):
    """Tells the clock where updates begin."""

    def __init__(self, contender: RLOO) -> None:
        self.contender = contender

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.contender.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.contender.clock.begin()
