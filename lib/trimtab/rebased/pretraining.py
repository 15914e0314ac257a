"""Language modelling on real text: training one mixer's model, and its perplexity, recalled tokens and others apart."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from trimtab.checkpoint import Checkpoint, resume_training, training_tensors
from trimtab.epochs import batch_of
from trimtab.errors import InputError
from trimtab.identity import machine
from trimtab.launch import CHECKPOINT, in_worker
from trimtab.rebased.model import LanguageModel, ModelConfig, hybrid
from trimtab.rebased.mqar_training import SAVE_EVERY, parameter_groups, shape
from trimtab.rebased.text import Text
from trimtab.validation import MOST_WORKERS, WIDEST, at_least, not_negative, one_of, rates, require, seeds

ARMS = {
    "softmax": ("softmax", 0), "based": ("based", 0), "rebased": ("rebased", 0),
    "based-hybrid": ("based", 2), "rebased-hybrid": ("rebased", 2), "conv": ("conv", 0),
}  # fmt: skip
"""What every second block mixes tokens with, and at every how many-th of those a window of softmax stands instead."""


@dataclass(frozen=True)
class PretrainConfig:
    """Section `pretrain`."""

    vocabulary: int = 2048
    """That of `pretrain_text`."""
    block_tokens: int = 256
    """Context."""
    d_model: int = 128
    depth: int = 4
    """Blocks: convolutions and the arm's mixer by turns."""
    heads: int = 4
    d_k: int = 16
    """Width of queries and keys of polynomial attention, per head."""
    window: int = 32
    mlp: int = 256
    tokens: int = 1_000_000
    """Trained on: the same for every arm, in the same order."""
    batch: int = 16
    """Blocks to a step."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The same for every arm; AdamW, rising for a tenth of the steps, then falling to 0 along a cosine."""
    sweep_tokens: int = 250_000
    """Of a sweep's runs, each with its own whole schedule."""
    weight_decay: float = 0.1
    seeds: tuple[int, ...] = (0,)
    dtype: str = "float32"
    """What the model computes in: float32, or bfloat16 by autocast; weights and optimiser stay in fp32."""
    readings: int = 10
    """Validations along a run."""
    workers: int = 1
    """Runs at one time, each in a process of its own."""
    common: int = 20
    """Pairs of tokens that stand more often in training text are known, not recalled."""
    valid_blocks: int = 64
    """By which the rate is chosen."""
    test_blocks: int = 512
    """By which arms are compared, spread evenly over the test documents."""

    def __post_init__(self) -> None:
        counts = "vocabulary block_tokens window tokens batch sweep_tokens readings common"
        at_least(1, self, *counts.split(), "valid_blocks", "test_blocks")
        at_least(1, self, "d_model", "heads", "d_k", "mlp", most=WIDEST)
        at_least(2, self, "depth")
        at_least(1, self, "workers", most=MOST_WORKERS)
        rule = f"a multiple of 2 `heads` = {2 * self.heads}, as rotary positions need heads of even width"
        require(self.d_model % (2 * self.heads) == 0, "d_model", self.d_model, rule)
        rates(self, "learning_rates")
        not_negative(self, "weight_decay")
        seeds(self, "seeds")
        one_of(("float32", "bfloat16"), self, "dtype")

    def model(self, arm: str) -> ModelConfig:
        """Raises InputError for an unknown arm."""
        if arm not in ARMS:
            raise InputError(f"{arm!r} is not an arm of `pretrain`: write one of {', '.join(ARMS)}.")
        kind, every = ARMS[arm]
        mixers = tuple(hybrid(kind, self.depth, window_every=every))
        return ModelConfig(
            self.vocabulary, self.d_model, mixers, self.heads, self.d_k, window=self.window, mlp=self.mlp
        )


@dataclass(frozen=True)
class PretrainRun:
    """A trained model and its curve."""

    model: LanguageModel
    history: list[dict[str, int | float]]
    """`step`, `tokens`, `loss` (of training, mean since the last reading), `valid` (nats a token)."""


def pretrain(
    config: PretrainConfig,
    arm: str,
    blocks: Int[Tensor, "blocks length_and_1"],
    valid: Int[Tensor, "valid_blocks length_and_1"],
    *,
    learning_rate: float,
    seed: int,
    tokens: int | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> PretrainRun:
    """One run over `tokens` (default: the configuration's), epoch after epoch without replacement.

    Interrupted and called again with the same checkpoint file, arguments and machine it continues, to the same weights.
    """
    length = blocks.shape[1] - 1
    steps = max(1, (tokens or config.tokens) // (config.batch * length))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(config.model(arm)).to(device)
    optimiser = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=learning_rate, betas=(0.9, 0.95), fused=True
    )
    names = ("batch", "weight_decay", "dtype", "readings")
    saved = Checkpoint(
        checkpoint, arm=arm, model=config.model(arm), config={name: getattr(config, name) for name in names},
        learning_rate=learning_rate, seed=seed, steps=steps, text=blocks, valid=valid, code=pretrain, **machine(device),
    )  # fmt: skip
    history, first = [], 0
    if (found := saved.load()) is not None:
        resume_training(found[0], model.state_dict(), optimiser)
        history, first = found[1]["history"], found[1]["step"]
    due = {(i + 1) * steps // config.readings for i in range(config.readings)}  # readings, after so many steps
    last_save, losses = time.monotonic(), []
    title = f"{arm} seed {seed} rate {learning_rate:g}"
    bar = tqdm(total=steps, initial=first, desc=title, unit="step", mininterval=1, disable=in_worker())
    for step in range(first, steps):
        rows = blocks[batch_of(step + 1, config.batch, len(blocks), seed)].to(device)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * shape(step, steps)
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step + 1 in due:
            held_out = float(token_losses(model, valid, config.dtype).mean())
            entry = {"step": step + 1, "tokens": (step + 1) * config.batch * length, "loss": sum(losses) / len(losses)}
            history.append(entry | {"valid": held_out})
            bar.set_postfix(valid=f"{held_out:.3f}", refresh=False)
            losses = []
            if time.monotonic() - last_save > SAVE_EVERY or step + 1 == steps:
                saved.save(training_tensors(model.state_dict(), optimiser), {"history": history, "step": step + 1})
                last_save = time.monotonic()
        bar.update()
    bar.close()
    return PretrainRun(model.eval(), history)


@torch.no_grad()
def token_losses(
    model: LanguageModel, blocks: Int[Tensor, "blocks length_and_1"], dtype: str = "float32", batch: int = 16
) -> Float[Tensor, "blocks length"]:
    """Nats of every prediction of `blocks[:, 1:]`."""
    device, found = model.embedding.weight.device, []
    for rows in blocks.split(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(rows[:, :-1].to(device)).float()
        found.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].to(device).flatten(), reduction="none").cpu())
    return torch.cat(found).view(len(blocks), -1)


def by_block(losses: Float[Tensor, "blocks length"], again: Bool[Tensor, "blocks length"]) -> pl.DataFrame:
    """Sums of nats and counts of predictions of each block, those that take recall (`text.recalls`) apart: columns
    `recalled_nats`, `recalled`, `others_nats`, `others`."""
    columns = {}
    for name, kept in (("recalled", again), ("others", ~again)):
        columns[f"{name}_nats"] = (losses * kept).sum(dim=1, dtype=torch.float64).tolist()
        columns[name] = kept.sum(dim=1).tolist()
    return pl.DataFrame(columns)


def spread(total: int, wanted: int) -> Int[Tensor, " chosen"]:
    """`wanted` of `total` indices, evenly apart; all of them where there are fewer."""
    return torch.linspace(0, total - 1, min(total, wanted)).round().long()


def by_position(losses: Float[Tensor, "blocks length"], bins: int = 16) -> pl.DataFrame:
    """Mean loss by place in the context: columns `position` (middle of a bin) and `nats`."""
    parts = losses.mean(dim=0).tensor_split(min(bins, losses.shape[1]))
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    middles = [(a + b) / 2 for a, b in pairwise(starts)]
    return pl.DataFrame({"position": middles, "nats": [float(part.mean()) for part in parts]})


def run_job(
    config: PretrainConfig, text: str, device: str, arm: str, learning_rate: float, seed: int, tokens: int, place: Path
) -> dict[str, Any]:
    """`pretrain` for `launch.each` with `places`, on the text of a folder: `history`, and `model`, a folder's path from
    where results are kept."""
    source = Text.load(Path(text))
    blocks, valid = (source.blocks(split, config.block_tokens) for split in ("train", "val"))
    run = pretrain(
        config, arm, blocks, valid[spread(len(valid), config.valid_blocks)], learning_rate=learning_rate, seed=seed,
        tokens=tokens, device=device, checkpoint=place / CHECKPOINT,
    )  # fmt: skip
    run.model.save(place / "model")
    return {"history": run.history, "model": f"{place.name}/model"}


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate of least validation loss. Raises InputError where none trains."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise InputError(f"No learning rate of {list(losses)} trains: lower them.")
    return min(finite, key=lambda rate: finite[rate])
