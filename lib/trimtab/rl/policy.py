"""A policy: a language model seen through nnsight, and what of it is trained.

Trained parameters are kept in fp32, whatever the model computes in; a subclass for each way of adapting it says what
they are. One engine serves rollouts and gradients, so that the two agree about every probability.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from trimtab.errors import InputError
from trimtab.interventions import Head, device_of, final_hidden
from trimtab.interventions.model import attention_of

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Policy:
    """A frozen model, or a view of it whose few trained parameters are `trained` (fp32 leaves, by name)."""

    def __init__(
        self, view: "TransformersModel", trained: Mapping[str, Tensor], base: "TransformersModel | None" = None
    ) -> None:
        self.view = view
        self.base = base or view
        attention_of(view)  # which refuses what no mask can keep apart
        if self.device.type == "cpu":
            # A third faster there in bf16 than torch's fused attention, backwards and in decoding, at these lengths.
            for model in (self.view, self.base):
                model._module.set_attn_implementation("eager")
        self.trained = dict(trained)
        self.training_bytes: dict[str, int] = {}
        """Once `train` was called: what it held beside the model, see there."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        return device_of(self.view)

    @cached_property
    def logits(self) -> Head:
        """Final hidden states to the model's own logits."""
        return Head(self.view)

    @cached_property
    def reference_logits(self) -> Head:
        """The same of the model as it was before training, whose unembedding may be another."""
        return Head(self.base)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor,
        position_ids: Int[Tensor, "batch seq"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Hidden states after the final norm; see `interventions.final_hidden`."""
        return final_hidden(self.view, input_ids, attention_mask, position_ids, cache)

    def reference_hidden(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Tensor, position_ids: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The same of the model as it was before training: what a KL penalty is taken to. Raises InputError where
        that is the model which is trained."""
        if self.base is self.view and self.trained:
            raise InputError("A KL penalty needs the model as it was before training: give a frozen copy as `base`.")
        return final_hidden(self.base, input_ids, attention_mask, position_ids)

    def collect_gradients(self) -> None:
        """Called after backward: gradients of the trained parameters must be in their `.grad`."""

    def publish(self) -> None:
        """Called after the trained parameters changed: the model must compute with them."""


class FullPolicy(Policy):
    """Every weight of the model is trained: fp32 master copies, published to the model in its own precision.

    With the model in bf16 a small update would round away; on the master copies it adds up.
    """

    def __init__(self, wrapped: "TransformersModel", base: "TransformersModel | None" = None) -> None:
        self.weights = dict(wrapped._module.named_parameters())  # tied weights come once
        for weight in self.weights.values():
            weight.requires_grad_()
        masters = {name: weight.detach().float().clone() for name, weight in self.weights.items()}
        super().__init__(wrapped, masters, base)

    def collect_gradients(self) -> None:
        """Move the model's gradients to the master copies."""
        for name, weight in self.weights.items():
            self.trained[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master copies into the model."""
        for name, weight in self.weights.items():
            weight.copy_(self.trained[name])
