"""What a user may give polynomial attention and a language model: lengths, masks, modes; threads and forks."""

import os
import subprocess
import sys

import pytest
import torch

from tests.rebased.kernels.problems import POLYNOMIALS, problem, relative, with_gradients
from trimtab.errors import InputError
from trimtab.rebased.decoding import generate
from trimtab.rebased.kernels import REBASED, attention, chunk, naive
from trimtab.rebased.mixers import PolynomialAttention
from trimtab.rebased.model import LanguageModel, ModelConfig


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("lengths", [(4, 10), (10, 4), (1, 70), (130, 65)])
@pytest.mark.parametrize("masked", [False, True])
def test_more_or_fewer_queries_than_keys_where_nothing_is_causal(name, lengths, masked):
    queries, keys = lengths
    q, k, v = problem(2, max(lengths), 2, 3, 4)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    mask = torch.ones(2, keys, dtype=torch.bool)
    if masked:
        mask[1, ::3] = False
    given = mask if masked else None
    weights = POLYNOMIALS[name](0.5 * torch.einsum("bihd,bjhd->bhij", q, k)) * mask[:, None, None]
    expected = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(-1, keepdim=True) + naive.EPS), v)
    out, after = attention(q, k, v, POLYNOMIALS[name], scale=0.5, causal=False, mask=given)
    assert out.shape == (2, queries, 2, 4)
    assert relative(out, expected) < 1e-9
    assert relative(after, attention(k, k, v, POLYNOMIALS[name], scale=0.5, causal=False, mask=given)[1]) < 1e-12


REFUSED = """
import torch
from trimtab.errors import InputError
from trimtab.rebased.kernels import attention
x = lambda time=6, heads=2, width=3, batch=2: torch.zeros(batch, time, heads, width)
for arguments, options in [
    ((x(4), x(10), x(10)), {}), ((x(), x(5), x()), {"causal": False}), ((x(), x(width=2), x()), {}),
    ((x(heads=1), x(), x()), {}), ((x(), x(), x(batch=1)), {}), ((x(), x(), x()), {"mask": torch.ones(2, 5)}),
]:
    try:
        print(attention(*arguments, **options)[0].shape)
    except InputError as error:
        print("refused", error)
"""


def test_shapes_that_do_not_fit_are_refused_in_one_sentence():
    """In a process of its own, where nothing checks shapes for the tests' sake."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, encoding="utf-8", check=False)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * 6, done.stdout + done.stderr


def test_the_backward_pass_of_the_first_tokens_in_bf16_is_as_good_as_the_definitions():
    """The output, rounded, times the gradient is nearly all of dz there."""
    q = torch.tensor([1.90625, 0.36328125]).view(1, 2, 1, 1)
    k = torch.tensor([0.21777344, -0.66015625]).view(1, 2, 1, 1)
    v = torch.tensor([-1.546875, -1.5625]).view(1, 2, 1, 1)
    found = {}
    for form, dtype in (("naive", torch.float64), ("naive", torch.bfloat16), ("chunk", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = {"naive": naive, "chunk": chunk}[form].attention(*leaves, REBASED, 1.0, eps=1e-6)
        out.backward(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).to(dtype))
        found[form, dtype] = leaves[1].grad.flatten().double()
    truth = found["naive", torch.float64]
    torch.testing.assert_close(truth, torch.tensor([0.01268, 0.00426], dtype=torch.float64), atol=1e-5, rtol=0)
    for form in ("naive", "chunk"):
        torch.testing.assert_close(found[form, torch.bfloat16], truth, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_gradients_in_bf16_are_as_good_as_the_definitions_at_every_token(name):
    q, k, v = (x.float().bfloat16() for x in problem(2, 150, 2, 8, 16))
    truth = with_gradients(naive.attention, q.double(), k.double(), v.double(), None, POLYNOMIALS[name], 0.35)
    worst = {}
    for form in (naive, chunk):
        got = with_gradients(form.attention, q, k, v, None, POLYNOMIALS[name], 0.35)
        worst[form] = [relative(a.double(), b) for a, b in zip(got, truth, strict=True)]
    for ours, definition in zip(worst[chunk], worst[naive], strict=True):
        assert ours < 1.2 * definition + 1e-6


def model(**options) -> LanguageModel:
    config = {"vocabulary": 20, "d_model": 16, "heads": 2, "d_k": 4, "d_v": 8, "window": 4, "mlp": 16, "positions": 40}
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**config | {"mixers": ("conv", "rebased", "window", "softmax")} | options))


@pytest.mark.parametrize("mixer", ["rebased", "based"])
def test_a_cached_token_has_its_gradient_and_its_mask(mixer):
    torch.manual_seed(0)
    layer, x = PolynomialAttention(16, 2, 4, arm=mixer), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, -1] = False
    whole = layer(x, mask)
    whole[:, -1].sum().backward()
    expected, layer.q.weight.grad = layer.q.weight.grad, None
    cache: dict = {}
    with torch.no_grad():
        layer(x[:, :-1], mask[:, :-1], cache)
    last = layer(x[:, -1:], mask[:, -1:], cache)
    torch.testing.assert_close(last, whole[:, -1:])
    last.sum().backward()
    torch.testing.assert_close(layer.q.weight.grad, expected)


def test_a_mask_of_integers_is_one_of_truths():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    made = model().eval()
    with torch.no_grad():
        for dtype in (torch.long, torch.int8):
            got = torch.cat([block.mixer(torch.ones(2, 6, 16), mask.to(dtype)) for block in made.blocks])
            want = torch.cat([block.mixer(torch.ones(2, 6, 16), mask.bool()) for block in made.blocks])
            assert torch.equal(got, want)
        assert made(ids, mask.bool()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "`temperature`"), ({"temperature": float("nan")}, "`temperature`"),
        ({"temperature": float("inf")}, "`temperature`"), ({"top_k": 0, "temperature": 1.0}, "`top_k`"),
        ({"top_k": -3}, "`top_k`"),
    ],
)  # fmt: skip
def test_what_no_token_can_be_drawn_with_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        generate(model(), [[1, 2]], 3, **options)


def test_dropout_is_off_while_it_writes_and_on_afterwards():
    made = model(dropout=0.9)
    assert made.train().training
    written = [generate(made, [[1, 2, 3]], 12) for _ in range(3)]
    assert written[0] == written[1] == written[2] == generate(made.eval(), [[1, 2, 3]], 12)
    generate(made.train(), [[1]], 1)
    assert made.training


FORK = """
import os, torch
from trimtab.rebased.kernels import attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, 70, 2, 4) for _ in range(3))
before = attention(q, k, v)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.allclose(attention(q, k, v)[0], before) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_of_a_process_that_has_used_the_kernels_may_use_them():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, encoding="utf-8", check=False)
    assert done.stdout == "0\n", done.stderr


THREADS = """
import threading, torch
from trimtab.rebased.kernels import attention
q, k, v = (torch.randn(2, 300, 2, 8) for _ in range(3))
def work():
    for _ in range(20):
        attention(q, k, v)
threads = [threading.Thread(target=work) for _ in range(4)]
[each.start() for each in threads], [each.join() for each in threads]
print("done")
"""


def test_several_threads_may_use_the_kernels_under_numbas_own_layer():
    variables = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=variables, capture_output=True, encoding="utf-8", check=False
    )
    assert done.stdout == "done\n", done.stderr


def test_a_read_only_installation_imports(tmp_path, root):
    """Numba finds no folder to keep what it compiles in, and goes on without."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch\nfrom trimtab.rebased.kernels import attention\n"
        "print(attention(*(torch.ones(1, 3, 1, 2) for _ in range(3)))[0].flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.startswith("[0.99999"), done.stderr
