"""Contenders of the other libraries' environment (`make peers`), each through its own trainer, nothing logged or saved.

Auxiliary losses are at the libraries' defaults and not active: no latent is dead within so few steps. Learning rates
warm up over a twentieth of the steps and fall linearly to zero after a fifth, as ours does (sparsify's from the start).
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import torch
from shape import Shape
from torch import Tensor, nn

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would be used wherever triton is installed, on a CPU too


def schedule(steps: int) -> tuple[int, int]:
    """(steps of warm-up, step at which the decay begins)."""
    return max(1, steps // 20), max(2, steps // 5)


class SAELens:
    """`SAETrainer.fit` on a `TopKTrainingSAE` at its defaults; autocast for bf16."""

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        torch.manual_seed(0)
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_model, d_sae=shape.latents, k=shape.k))
        warm_up, decay = schedule(steps)
        self.config = SAETrainerConfig(
            total_training_samples=steps * shape.batch,
            train_batch_size_samples=shape.batch,
            lr=rate,
            lr_end=rate,
            lr_warm_up_steps=warm_up,
            lr_decay_steps=steps - decay,
            autocast=shape.precision == "bf16",
        )

    def fit(self, batches: Iterator[Tensor]) -> None:
        from sae_lens import SAETrainer

        with contextlib.suppress(StopIteration):
            SAETrainer(self.config, self.sae, batches).fit()

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast):
            acts = torch.zeros(len(x), self.sae.cfg.d_sae).scatter(1, indices, values)
            loss = self.sae.mse_loss_fn(self.sae.decode(acts), x).sum(dim=-1).mean()
        loss.backward()
        self.sae.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)


class DictionaryLearning:
    """`TopKTrainer.update`, which is all that `trainSAE` does in a step that it does not log."""

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        warm_up, decay = schedule(steps)
        self.trainer = TopKTrainer(
            steps=steps,
            activation_dim=shape.d_model,
            dict_size=shape.latents,
            k=shape.k,
            layer=0,
            lm_name="",
            lr=rate,
            warmup_steps=warm_up,
            decay_start=decay,
            seed=0,
            device=shape.device,
        )

    def fit(self, batches: Iterator[Tensor]) -> None:
        for step, x in enumerate(batches):
            self.trainer.update(step, x)

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        ae = self.trainer.ae
        acts = torch.zeros(len(x), ae.dict_size).scatter_(dim=-1, index=indices, src=values)
        (x - ae.decode(acts)).pow(2).sum(dim=-1).mean().backward()
        ae.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


class Sparsify:
    """`Trainer.fit` with Adam, hooked onto a module that gives out the batches in place of a language model."""

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        self.rows = Rows(shape, steps)
        self.folder = tempfile.TemporaryDirectory()
        config = TrainConfig(
            SparseCoderConfig(num_latents=shape.latents, k=shape.k),
            batch_size=1,
            optimizer="adam",
            lr=rate,
            lr_warmup_steps=schedule(steps)[0],
            hookpoints=["site"],
            log_to_wandb=False,
            save_every=steps + 1,
            save_dir=self.folder.name,
        )
        self.trainer = Trainer(config, self.rows, self.rows)
        self.coder = self.trainer.saes["site"]

    def fit(self, batches: Iterator[Tensor]) -> None:
        self.rows.batches = batches
        self.trainer.fit()

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        error = x - self.coder.decode(values, indices)
        (error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).backward()
        self.coder.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.coder(x).sae_out


class Rows(nn.Module):
    """Both the dataset and the model that sparsify's trainer wants: item i is a sequence of as many tokens as a batch
    has rows, and the "model" gives that batch as the activations of `site`."""

    def __init__(self, shape: Shape, steps: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.steps, self.device = steps, torch.device(shape.device)
        self.tokens = torch.zeros(shape.batch, dtype=torch.long)
        self.dummy_inputs = {"input_ids": self.tokens[:1, None]}
        self.x = torch.zeros(1, shape.d_model)

    @property
    def base_model(self) -> "Rows":
        return self

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.x = next(self.batches)  # its end, a StopIteration, ends the trainer's loop over the data
        return {"input_ids": self.tokens}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.x[None])
