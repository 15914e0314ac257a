"""What all contenders of `benchmarks/sae.py` are given alike."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Size and precision of one comparison."""

    d_model: int
    latents: int
    k: int
    batch: int
    precision: str = "fp32"
    """`bf16`: matrix products in bfloat16, as far as the library does that; weights stay fp32."""
    device: str = "cpu"
