"""What a user may give an SAE and its kernels: any shape and dtype, any row; what cannot be is one sentence."""

import subprocess
import sys

import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.sae import SAE, kernels
from trimtab.sae.evaluation import calibrate, weighted_fvu
from trimtab.sae.kernels import naive
from trimtab.sae.objectives import OBJECTIVES, Hierarchical, TopK

KINDS = {"topk": False, "jumprelu": True}


def make(jump: bool = False, latents: int = 64, d_model: int = 16, k: int = 8) -> SAE:
    sae = SAE(d_model, latents, k, jump=jump, generator=torch.Generator().manual_seed(0))
    if sae.log_threshold is not None:
        with torch.no_grad():
            sae.log_threshold.fill_(-1.5)
    return sae


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_leading_dimensions_and_dtypes_are_kept(kind, shape, dtype, weights):
    sae, x = make(KINDS[kind]).to(weights), rows(*shape).to(dtype)
    for options in ({}, {"k": 3}, {"threshold": 0.3}, {"threshold": 0.3, "k": 3}):
        latents = sae.encode(x, **options)
        assert latents.values.shape[:-1] == latents.indices.shape[:-1] == shape[:-1]
        assert latents.values.dtype == dtype
        x_hat = sae.decode(latents)
        assert (x_hat.shape, x_hat.dtype) == (x.shape, dtype)
        torch.testing.assert_close(sae(x, **options), x_hat)
        flat = sae.encode(x.reshape(-1, 16), **options)
        assert torch.equal(latents.values.reshape(flat.values.shape), flat.values)
        assert (latents.values >= 0).all()
        assert latents.prefix(1).values.shape == (*shape[:-1], min(1, latents.values.shape[-1]))
        assert torch.equal(latents.descending().values, latents.values)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_is_the_definition(kind):
    sae, x = make(KINDS[kind]).double(), rows(7, 16).double()
    pre = torch.relu(x @ sae.W_enc.T + sae.b_enc)
    if sae.log_threshold is not None:
        pre = torch.where(pre > sae.log_threshold.exp(), pre, 0)
    best = pre.topk(8, dim=1)
    code = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    torch.testing.assert_close(sae(x, 8), code @ sae.W_dec + sae.b_dec)
    above = torch.where(pre > 0.4, pre, 0)
    torch.testing.assert_close(sae(x, threshold=0.4), above @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_every_way_of_encoding_has_the_gradient_of_its_values(kind, threshold):
    sae, x = make(KINDS[kind]).double(), rows(5, 16).double().requires_grad_()
    towards = rows(5, 16, seed=2).double()
    (sae(x, threshold=threshold) * towards).sum().backward()
    assert x.grad is not None
    assert sae.W_enc.grad is not None
    step, direction = 1e-6, rows(5, 16, seed=3).double()
    with torch.no_grad():
        up, down = (sae(x + sign * step * direction, threshold=threshold) for sign in (1, -1))
        slope = ((up - down) * towards).sum() / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)
    assert sae.W_enc.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_holds_a_nan_is_no_row_without_latents(kind):
    sae, x = make(KINDS[kind]), rows(3, 16)
    x[1, 4] = torch.nan
    for options in ({}, {"threshold": 0.1}):
        values = sae.encode(x, **options).values
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threshold", [-1.0, -0.0, 0.0, float("-inf")])
def test_below_zero_a_threshold_is_zero(threshold):
    sae, x = make(), rows(4, 16)
    assert torch.equal(sae.encode(x, threshold=threshold).values, sae.encode(x, threshold=0.0).values)


@pytest.mark.parametrize(
    "objective", [TopK(8), Hierarchical(8), *(OBJECTIVES[n](8) for n in ("batchtopk", "matryoshka"))]
)
def test_the_loss_has_its_gradient_at_the_rows_too(objective):
    """Against autograd of the definition, where the same latents are chosen."""
    sae, x = make().double(), rows(6, 16).double().requires_grad_()
    objective(x, sae, None).value.backward()
    assert x.grad is not None
    step, direction = 1e-6, rows(6, 16, seed=4).double()
    with torch.no_grad():
        up, down = (objective(x + sign * step * direction, sae, None).value for sign in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def arguments(**changes) -> dict:
    values, indices = torch.relu(rows(4, 3)).sort(dim=1, descending=True).values, torch.arange(12).view(4, 3)
    given = {"x": rows(4, 8), "values": values, "indices": indices, "W_dec": rows(12, 8), "b_dec": rows(8)}
    return given | {"weights": torch.ones(1, 4)} | changes


def test_the_loss_over_prefixes_is_its_definition_at_the_rows():
    given = arguments()
    given["x"].requires_grad_()
    kernels.prefix_loss(**given).backward()
    found, given["x"].grad = given["x"].grad, None
    naive.prefix_loss(**given).backward()
    torch.testing.assert_close(found, given["x"].grad)


WRONG = {
    "an index too large": {"indices": torch.full((4, 3), 12)}, "a negative index": {"indices": torch.full((4, 3), -1)},
    "indices of another shape": {"indices": torch.zeros(4, 2, dtype=torch.long)},
    "values of another shape": {"values": torch.ones(3, 3)}, "a wrong width": {"x": rows(4, 7)},
    "a wrong bias": {"b_dec": rows(7)}, "too few weights": {"weights": torch.ones(1, 3)},
    "weights for other rows": {"weights": torch.ones(3, 4)}, "indices that are none": {"indices": torch.zeros(4, 3)},
    "one dimension": {"values": torch.ones(3)}, "whole numbers": {"x": torch.ones(4, 8, dtype=torch.long)},
}  # fmt: skip
ENCODED = {
    "a wrong width": (rows(3, 15), {}), "whole numbers": (rows(3, 16).long(), {}),
    "one number": (torch.tensor(1.0), {}),
    "k = 0": (rows(3, 16), {"k": 0}), "k = 65": (rows(3, 16), {"k": 65}),
    "no threshold": (rows(3, 16), {"threshold": float("nan")}),
}  # fmt: skip
EACH = """
import torch
from tests.sae.test_inputs import ENCODED, WRONG, arguments, make
from trimtab.errors import InputError
from trimtab.sae import kernels
for name, changes in WRONG.items():
    try:
        kernels.prefix_loss(**arguments(**changes))
    except InputError as error:
        print(name, "|", error)
for name, (x, options) in ENCODED.items():
    try:
        make().encode(x, **options)
    except InputError as error:
        print(name, "|", error)
"""


def test_what_does_not_fit_is_refused_in_one_sentence_before_any_memory_is_touched(root):
    """In a process of its own, where nothing checks types and shapes for the tests' sake."""
    done = subprocess.run([sys.executable, "-c", EACH], cwd=root, capture_output=True, encoding="utf-8", check=False)
    told = [line.partition(" | ")[0] for line in done.stdout.splitlines()]
    assert told == [*WRONG, *ENCODED], done.stderr


def test_a_row_of_zeros_in_the_decoder_stays_finite():
    sae = make()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalise_decoder()
    assert sae.W_dec.isfinite().all()
    assert not sae.W_dec[3].any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[[0, 63]], torch.ones(2))


def test_reading_and_folding_leave_torchs_generator_alone(tmp_path):
    make().save_pretrained(tmp_path / "sae")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SAE.from_pretrained(tmp_path / "sae").fold(torch.zeros(16), 2.0)
    assert torch.equal(torch.rand(3), expected)


class Rows(ActivationCache):
    """A cache of rows whose norms differ as much as a model's do."""

    def __init__(self) -> None:
        norms = torch.exp(0.6 * rows(600, 1, seed=6))
        self.x = norms * rows(600, 16, seed=7)

    def read(self, **_):
        yield from ({"x": chunk} for chunk in self.x.split(150))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budgets", [[2], [4, 16], [16]])
def test_a_threshold_lets_as_many_latents_through_as_it_is_asked_for(kind, budgets):
    sae, cache = make(KINDS[kind], latents=128), Rows()
    for k, threshold in calibrate(sae, cache, budgets).items():
        whole = sum((sae.encode(chunk["x"], threshold=0.0).values > 0).sum() for chunk in cache.read()) / 600
        active = (
            sum((sae.encode(chunk["x"], threshold=threshold).values > threshold).sum() for chunk in cache.read()) / 600
        )
        assert active == pytest.approx(min(k, float(whole)), abs=0.02 + (0.0 if kind == "topk" else k))
        assert kind == "jumprelu" or active == pytest.approx(k, abs=0.02)


def test_rows_with_fewer_latents_than_a_budget_are_read_whole():
    sae, cache = make(jump=True), Rows()
    with torch.no_grad():
        sae.log_threshold.fill_(1.5)
    few = max(int((sae.encode(chunk["x"]).values > 0).sum(dim=1).max()) for chunk in cache.read())
    assert few < 60
    assert weighted_fvu(sae, cache, {60: 1.0}) == pytest.approx(weighted_fvu(sae, cache, {few: 1.0}))
