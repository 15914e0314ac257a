"""Steering vectors: one vector for each chosen layer, added to the residual stream at every position."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.interventions import Place, steer

if TYPE_CHECKING:
    from nnsight import TransformersModel


class SteeringVectors(nn.Module):
    """s_l for each layer l of `layers`: h_l <- h_l + scale s_l at every position, the prompt's included (Bias-Only
    Adaptation, section 3). All start at zero, in fp32, whatever the model's own precision.

    With `rank` the vectors are A B, A [layers, rank] random and B [rank, d_model] zero: low-rank across layers.
    `place` is where in its block a vector is added; `block`, after it, is the paper's.
    """

    def __init__(
        self,
        layers: Sequence[int],
        d_model: int,
        *,
        place: Place = "block",
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers):
            raise InputError(f"Steering vectors need distinct layers, at least one, not {list(layers)}.")
        if rank is not None and not 1 <= rank <= len(layers):
            raise InputError(f"The rank across {len(layers)} layers must lie between 1 and {len(layers)}, not {rank}.")
        self.layers = tuple(sorted(layers))
        self.place: Place = place
        self.scale = 1.0
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(len(layers), d_model))
        else:
            self.A = nn.Parameter(torch.randn(len(layers), rank, generator=generator) / math.sqrt(rank))
            self.B = nn.Parameter(torch.zeros(rank, d_model))
        self.rank = rank

    def vectors(self) -> Float[Tensor, "layers d_model"]:
        """What is added, a row for each of `layers`."""
        return self.scale * (self.weight if self.rank is None else self.A @ self.B)

    def applied_to(self, wrapped: "TransformersModel") -> "TransformersModel":
        """A view of the model with these vectors in it, for traces and for generation; it follows their training."""
        return steer(wrapped, self.layers, self.vectors, self.place)
