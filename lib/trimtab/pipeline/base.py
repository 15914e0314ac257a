"""Section `base`, which every stage takes."""

from dataclasses import dataclass

from trimtab.validation import LAST_SEED, MOST_WORKERS, at_least, one_of, require


@dataclass(frozen=True)
class BaseConfig:
    """What all stages share."""

    scale: str
    """Name of the scale, shown in records."""
    seed: int
    """Seed of data order, splits and samples."""
    device: str
    """cpu | cuda | auto."""
    threads: int
    """Threads of torch on the CPU."""

    def __post_init__(self) -> None:
        require(bool(self.scale), "scale", self.scale, "a name")
        at_least(0, self, "seed", most=LAST_SEED)
        one_of(("cpu", "cuda", "auto"), self, "device")
        at_least(1, self, "threads", most=MOST_WORKERS)
