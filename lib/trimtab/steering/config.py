"""What every arm of the steering comparison shares."""

from dataclasses import dataclass

from trimtab.rl.config import RLConfig
from trimtab.validation import ascending, at_least, one_of, positive, rates, require, seeds


@dataclass(frozen=True)
class SteeringConfig(RLConfig):
    """Section `steering`: how an arm is trained (see `RLConfig`), on what, and how it is read."""

    task: str = "sum"
    """What the policy is trained on: a name of `rl.tasks.TASKS`."""
    held_out: str = ""
    """The task whose test items decide; empty: those of the training task."""
    other_tasks: tuple[str, ...] = ()
    """Tasks it was not trained on, read as well."""
    train_items: int = 1000
    """Items to draw prompts from."""
    test_items: int = 500
    """Held-out items, of the training task."""
    other_items: int = 200
    """Held-out items of each other task."""
    read_tokens: int = 64
    """The most, of a completion of a held-out item: more than in training, so that a gain is not one of brevity."""
    read_temperature: float = 1.0
    """Of completions drawn for held-out items."""
    samples: int = 4
    """Completions drawn for a held-out item of the task that decides, beside the greedy one ..."""
    sampled_items: int = 100
    """... of this many of them."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Grid of Adam's learning rate, the same for every arm, tried with the first seed."""
    sweep_updates: int = 8
    """Updates after which all but the two best rates are dropped."""
    seeds: tuple[int, ...] = (0,)
    """One full run each: a seed sets the order of the items and the samples."""
    dtype: str = "bfloat16"
    """What the model computes in; trained parameters are fp32."""

    @property
    def reading(self) -> str:
        """The task whose test items decide."""
        return self.held_out or self.task

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.task), "task", self.task, "the name of a task")
        require(len(set(self.other_tasks)) == len(self.other_tasks), "other_tasks", self.other_tasks, "distinct names")
        at_least(1, self, "train_items", "test_items", "read_tokens", "sweep_updates")
        at_least(0, self, "samples", "sampled_items", "other_items")
        positive(self, "read_temperature", most=100)
        rates(self, "learning_rates")
        seeds(self, "seeds")
        one_of(("bfloat16", "float32"), self, "dtype")


@dataclass(frozen=True)
class ControlsConfig:
    """Section `steering_controls`."""

    prefixes: int = 20
    """Likeliest first tokens, of either model, that are tried as a forced prefix."""
    prefix_items: int = 60
    """Validation items on which the best is chosen."""

    def __post_init__(self) -> None:
        at_least(1, self, "prefixes", "prefix_items")


@dataclass(frozen=True)
class LensConfig:
    """Section `steering_lens`."""

    prompts_read: int = 64
    """Held-out prompts whose last residuals the difference lens averages over."""
    items: int = 100
    """Held-out items on which each layer's contribution is read ..."""
    layer_step: int = 1
    """... or that of each n-th ..."""
    latent_items: int = 100
    """... and that of latents."""
    top: int = 10
    """Promoted tokens shown and compared between seeds."""
    random_draws: int = 20
    """Sets of same-norm random vectors."""
    latents: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of SAE latents that the vector of the SAE's layer is rebuilt from."""

    def __post_init__(self) -> None:
        at_least(1, self, "prompts_read", "items", "layer_step", "latent_items", "random_draws")
        at_least(2, self, "top")
        ascending(self, "latents")
        require(16 in self.latents, "latents", self.latents, "a list that holds 16, which a claim is about")
