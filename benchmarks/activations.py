"""Capture speed: nnsight with early exit, a plain forward hook with early exit, and the full forward, in one run.

    python benchmarks/activations.py [--model data/model] [--rounds 15]

The three take turns in random order, so that a slow moment of the machine, or what one leaves in its caches, hits them
alike; the table holds medians over rounds, and
ratios are medians of per-round ratios. Writes benchmarks/activations.csv.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from tqdm import tqdm

from trimtab.interventions import capture, wrap
from trimtab.pipeline.provenance import hardware, versions
from trimtab.pretrained import load_model, load_tokenizer

BATCH, TOKENS = 16, 256


class Stop(Exception):
    """Leaves the forward pass from inside a hook."""


def hook_capture(model, ids, mask, site):
    kept = {}

    def hook(module, inputs, output):
        kept[site] = output if isinstance(output, torch.Tensor) else output[0]
        raise Stop

    handle = model.model.layers[site].register_forward_hook(hook)
    try:
        with torch.inference_mode():
            model(input_ids=ids)
    except Stop:
        return kept
    finally:
        handle.remove()


def full_forward(model, ids, mask, site):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def seconds(work: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="data/model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 14, 24])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model, "bfloat16", device)
    wrapped = wrap(model, load_tokenizer(options.model))
    ids = torch.randint(5, model.config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    mask = torch.ones_like(ids)
    rows, chance = [], random.Random(0)
    for site in options.sites:
        works = {
            "nnsight, early exit": lambda site=site: capture(wrapped, ids, mask, [site]),
            "forward hook, early exit": lambda site=site: hook_capture(model, ids, mask, site),
            "full forward": lambda site=site: full_forward(model, ids, mask, site),
        }
        assert torch.equal(capture(wrapped, ids, mask, [site])[site], hook_capture(model, ids, mask, site)[site])
        for work in works.values():
            seconds(work, device)
        times = {name: [] for name in works}
        for _ in tqdm(range(options.rounds), desc=f"site {site}"):
            for name, work in chance.sample(list(works.items()), len(works)):
                times[name].append(seconds(work, device))
        taken = {name: torch.tensor(values) for name, values in times.items()}
        for name, values in taken.items():
            rows.append(
                {
                    "site": site,
                    "way": name,
                    "tokens_per_s": round(BATCH * TOKENS / values.median().item()),
                    "ms": round(values.median().item() * 1e3, 1),
                    "nnsight_over_this": round((values / taken["nnsight, early exit"]).median().item(), 3),
                }
            )
    table = pl.DataFrame(rows).with_columns(
        pl.lit(f"{BATCH} x {TOKENS} bf16").alias("batch"),
        pl.lit(device).alias("device"),
        pl.lit(hardware()).alias("hardware"),
        pl.lit(", ".join(f"{k} {v}" for k, v in versions().items() if k in ("torch", "transformers", "nnsight"))).alias(
            "versions"
        ),
    )
    table.write_csv(options.out)
    with pl.Config(tbl_rows=-1, fmt_str_lengths=40):
        print(table.drop("batch", "device", "hardware", "versions"))


if __name__ == "__main__":
    main()
