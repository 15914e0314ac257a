"""Contenders of this project's environment: Trimtab's arms, and the dense step one would write in plain PyTorch."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch._inductor.compile_fx  # noqa: F401, loaded with the rest, so as not to count as memory of a step
import torch.nn.functional as F
from shape import Shape
from torch import Tensor

from trimtab.sae import SAE, kernels
from trimtab.sae.config import Arm, SAEConfig
from trimtab.sae.kernels import cpu  # noqa: F401, likewise
from trimtab.sae.training import Learner


class Trimtab:
    """`training.Learner`, which is what `training.train` steps through."""

    kind = "topk"

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        self.shape, self.arm = shape, Arm(self.kind, shape.k)
        precision = {"fp32": "float32", "bf16": "bfloat16"}[shape.precision]
        config = SAEConfig(latents=shape.latents, batch=shape.batch, budgets=(shape.k,), precision=precision)
        self.sae = SAE(shape.d_model, shape.latents, shape.k, generator=torch.Generator().manual_seed(0))
        self.sae.to(shape.device)
        relative = rate * math.sqrt(shape.latents / 2**14)  # the Learner divides by it
        self.learner = Learner(self.arm, config, relative, steps, self.sae)
        self.weights = prefix_weights(self.learner.objective.budgets, shape)

    def fit(self, batches: Iterator[Tensor]) -> None:
        for number, x in enumerate(batches, start=1):
            self.learner.step(x, number)

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        kernels.prefix_loss(x, values, indices, self.sae.W_dec, self.sae.b_dec, self.weights).backward()
        self.learner.optimiser.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x, self.shape.k))


class TrimtabPowersOfTwo(Trimtab):
    kind = "hierarchical-pow2"


class TrimtabAll(Trimtab):
    kind = "hierarchical"


class Dense:
    """TopK with a dense decoder, forward and backward compiled: the same optimiser, projection and normalisation."""

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        self.shape = shape
        self.sae = SAE(shape.d_model, shape.latents, shape.k, generator=torch.Generator().manual_seed(0))
        self.sae.to(shape.device)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=rate, fused=True)
        self.loss, self.loss_of_latents = torch.compile(self._loss), torch.compile(self._loss_of_latents)

    def _loss(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.shape.precision == "bf16"):
            values, indices = F.relu(F.linear(x, self.sae.W_enc, self.sae.b_enc)).topk(self.shape.k, dim=1)
            return self._loss_of_latents(x, values, indices)

    def _loss_of_latents(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.shape.precision == "bf16"):
            latents = torch.zeros(len(x), self.shape.latents, dtype=values.dtype, device=x.device)
            x_hat = latents.scatter(1, indices, values) @ self.sae.W_dec + self.sae.b_dec
            return (x_hat - x).square().mean()

    def fit(self, batches: Iterator[Tensor]) -> None:
        for x in batches:
            self.optimiser.zero_grad()
            self.loss(x).backward()
            self.sae.project_gradient()
            self.optimiser.step()
            self.sae.normalise_decoder()

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        self.loss_of_latents(x, values, indices).backward()
        self.optimiser.zero_grad()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x, self.shape.k))


class DensePrefixes(Dense):
    """HierarchicalTopK over J = 1..K with every prefix materialised, compiled: what fused kernels avoid."""

    def _loss_of_latents(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        steps = self.sae.W_dec[indices] * values[..., None]
        return (self.sae.b_dec + steps.cumsum(dim=1) - x[:, None]).square().mean()


class RankByRank(Trimtab):
    """HierarchicalTopK over J = 1..K by the algorithm of the official kernel, in PyTorch operations.

    Prefixes are walked up for the loss and down again for the gradients, which are added into a dense dW_dec by atomics
    (`index_add_`): memory does not grow with K. Encoder, optimiser and the rest are ours.
    """

    kind = "hierarchical"

    def __init__(self, shape: Shape, rate: float, steps: int) -> None:
        super().__init__(shape, rate, steps)
        self.learner.objective = self.objective

    def objective(self, x: Tensor, sae: SAE, dtype: torch.dtype | None) -> tuple[Tensor, object]:
        latents = sae.encode(x, self.shape.k, dtype=dtype)
        return _Walk.apply(x, *latents, sae.W_dec, sae.b_dec), latents

    def decoder_loss(self, x: Tensor, values: Tensor, indices: Tensor) -> None:
        _Walk.apply(x, values, indices, self.sae.W_dec, self.sae.b_dec).backward()
        self.learner.optimiser.zero_grad()


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, indices, W_dec, b_dec):
        k = values.shape[1]
        residual, loss = b_dec - x, torch.zeros((), device=x.device)
        for t in range(k):
            residual.addcmul_(W_dec[indices[:, t]], values[:, t, None])
            loss += residual.square().sum()
        d_values, d_W, suffix = torch.empty_like(values), torch.zeros_like(W_dec), torch.zeros_like(residual)
        for t in reversed(range(k)):
            direction, v = W_dec[indices[:, t]], values[:, t, None]
            suffix += residual
            d_values[:, t] = (direction * suffix).sum(dim=1)
            d_W.index_add_(0, indices[:, t], suffix * v)
            residual.addcmul_(direction, v, value=-1)
        scale = 1 / (x.numel() * k)
        ctx.save_for_backward(*(g.mul_(2 * scale) for g in (d_values, d_W, suffix.sum(dim=0))))
        return loss * scale

    @staticmethod
    def backward(ctx, upstream):
        d_values, d_W, d_b = (upstream * gradient for gradient in ctx.saved_tensors)
        return None, d_values, None, d_W, d_b


def prefix_weights(budgets: Mapping[int, float], shape: Shape) -> Tensor:
    weights = torch.zeros(1, shape.k + 1)
    for j, weight in budgets.items():
        weights[0, j] = weight / (shape.batch * shape.d_model)
    return weights.to(shape.device)
