"""What all contenders of `benchmarks/steering.py` are given alike: a job, its questions, and the clock they run by."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meter import now

from trimtab.rl.tasks import Item

TASK = "sum"
NEVER = -1
"""A token that does not exist, for completions that nothing ends."""


@dataclass(frozen=True)
class Job:
    """Updates of one policy; its model computes in bf16, and what is trained is kept in fp32."""

    model: str
    """Folder."""
    regime: str
    """`fixed`: no completion ends before `tokens`, and every second one is rewarded, so that no group can be left out
    of the update: equal work for all. `natural`: completions end where the policy ends them, and those that end
    with the answer are rewarded."""
    rate: float
    updates: int
    prompts: int
    group: int
    tokens: int
    """The most, of a completion."""
    seed: int = 0
    device: str = "cpu"

    @property
    def fixed(self) -> bool:
        return self.regime == "fixed"


@dataclass(frozen=True)
class Questions:
    """What is asked."""

    items: list[Item]
    batches: list[list[int]]
    """Which of them the first updates take: Trimtab's own order, in which the others get them too."""

    @classmethod
    def read(cls, path: Path) -> "Questions":
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls([Item(**entry) for entry in found["items"]], found["batches"])


class Over(Exception):
    """No further update is wanted."""


@dataclass
class Clock:
    """Told by a contender, from inside its library's own loop, where updates begin and rollouts end: the way by which
    that loop is driven, and measured whole."""

    device: str
    wait: Callable[[], None]
    """Called between updates: returns when the next is wanted, raises `Over` when none is."""
    updates: list[dict[str, float]] = field(default_factory=list)
    """Of each one taken: seconds, those of its rollout, mean tokens of a completion, mean reward."""
    began: float | None = None
    rolled: float = 0.0
    lengths: Sequence[float] = ()
    rewards: Sequence[float] = ()

    def begin(self) -> None:
        """An update begins, and the one before has ended."""
        if self.began is not None:
            seconds = now(self.device) - self.began
            self.updates.append({
                "seconds": seconds, "rollout_s": self.rolled - self.began, "length": mean(self.lengths),
                "reward": mean(self.rewards),
            })  # fmt: skip
        self.wait()
        self.began = now(self.device)

    def rolled_out(self) -> None:
        """All completions are there."""
        self.rolled = now(self.device)

    def judged(self, lengths: Sequence[float], rewards: Sequence[float]) -> None:
        """What they were."""
        self.lengths, self.rewards = lengths, rewards


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
