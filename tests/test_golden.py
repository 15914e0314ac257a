"""Whole training steps against formulas written down here: loss by the model's own logits and autograd, clipping, the
learning rate's schedule and AdamW in fp64 by hand. What any part of a step gets wrong shows in the parameters."""

import copy
import math

import pytest
import torch

from trimtab.rebased import pretraining
from trimtab.rebased.pretraining import PretrainConfig, pretrain
from trimtab.repetition import training as repetition
from trimtab.repetition.arms import Arm
from trimtab.repetition.config import TrainingConfig
from trimtab.sae.config import Arm as Sparse
from trimtab.sae.config import SAEConfig
from trimtab.sae.training import Run, _learner

PREFIXES = torch.randint(258, (9, 5), generator=torch.Generator().manual_seed(0))
BLOCKS = torch.randint(258, (7, 16), generator=torch.Generator().manual_seed(1))


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, in fp64; moments by parameter name."""

    def __init__(self, betas, eps=1e-8):
        self.betas, self.eps, self.moments, self.count = betas, eps, {}, 0

    @torch.no_grad()
    def step(self, parameters, rate, decay):
        """`decay`: from name to weight decay."""
        self.count += 1
        for name, parameter in parameters.items():
            g = parameter.grad
            m, v = self.moments.get(name, (0.0, 0.0))
            m = self.betas[0] * m + (1 - self.betas[0]) * g
            v = self.betas[1] * v + (1 - self.betas[1]) * g * g
            self.moments[name] = m, v
            m_hat, v_hat = m / (1 - self.betas[0] ** self.count), v / (1 - self.betas[1] ** self.count)
            parameter.copy_(parameter * (1 - rate * decay(name)) - rate * m_hat / (v_hat.sqrt() + self.eps))
            parameter.grad = None


def clip(parameters, most):
    """The gradient's norm before."""
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
    for p in parameters.values():
        p.grad *= min(1.0, most / norm)
    return norm


def repeats(row, n):
    """Which tokens belong to an n-gram that stood earlier in the row; and the share of different n-grams."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    marked = [False] * len(row)
    for i, gram in enumerate(grams):
        if gram in grams[:i]:
            marked[i : i + n] = [True] * n
    return marked, len(set(grams)) / len(grams)


def repetition_loss(model, kind, config, block, prefixes, written):
    """Of one update, from log-probabilities of the model's own logits."""
    if kind.startswith("likelihood"):
        logits = model(block[None]).logits[0, :-1].double().log_softmax(-1)
        loss = -logits[torch.arange(len(block) - 1), block[1:]].mean()
        if kind == "likelihood+tokens":
            pushed = 0.0
            for t in range(1, len(block)):
                for c in set(block[:t].tolist()) - {int(block[t])}:
                    pushed = pushed - (1 - logits[t - 1, c].exp()).log()
            loss = loss + config.unlikelihood_weight * pushed / (len(block) - 1)
        return loss
    rows = torch.cat([prefixes, written], dim=1)
    log_p = model(rows).logits[:, prefixes.shape[1] - 1 : -1].double().log_softmax(-1)
    log_p = log_p.gather(2, written[..., None])[..., 0]
    marked, different = zip(*(repeats(row, config.n) for row in written.tolist()), strict=True)
    rewards = torch.tensor(different, dtype=torch.float64)
    loss = 0.0
    if kind in ("policy", "both"):
        advantages = rewards - rewards.mean()
        loss = loss - config.reward_weight * (advantages[:, None] * log_p).sum() / written.numel()
    if kind in ("unlikelihood", "both"):
        mask = torch.tensor(marked, dtype=torch.float64)
        loss = loss - config.unlikelihood_weight * (mask * (1 - log_p.exp()).log()).sum() / written.numel()
    return loss


@pytest.mark.parametrize(
    "arm", ["likelihood", "unlikelihood-token", "policy", "unlikelihood", "implicit", "implicit-joint"]
)
def test_updates_against_repetition(model_folder, monkeypatch, arm):
    """Rollouts of three different tokens, so that they repeat; max_grad_norm small, so that it clips."""
    config = TrainingConfig(
        updates=6, prefixes=3, prefix_tokens=5, tokens=12, n=2, readings=1, rows=2, weight_decay=0.1,
        max_grad_norm=0.05, reward_weight=1.5, unlikelihood_weight=0.7,
    )  # fmt: skip
    chosen = Arm(arm)
    policy = chosen.policy(str(model_folder), dtype="float32", device="cpu", seed=0)
    model = copy.deepcopy(policy.view._module).double()
    seen = []

    def rollouts(self, prefixes):
        generator = torch.Generator().manual_seed(self.number)
        seen.append((prefixes, torch.randint(60, 63, (len(prefixes), 12), generator=generator)))
        return seen[-1][1]

    texts, on_text = [], repetition.Step.on_text
    monkeypatch.setattr(repetition.Step, "_rollouts", rollouts)
    monkeypatch.setattr(
        repetition.Step, "on_text", lambda self, block, kind: texts.append(block) or on_text(self, block, kind)
    )
    trained = repetition.train(policy, chosen, PREFIXES, BLOCKS, lambda policy: 1.0, config, learning_rate=1e-3, seed=0)
    parameters = {name: p for name, p in model.named_parameters() if name in policy.trained}
    assert parameters
    assert len(parameters) == len(policy.trained)
    adam, clipped = AdamW((0.9, 0.999)), 0
    for number, update in enumerate(trained.history):
        prefixes, written = (None, None) if update.kind.startswith("likelihood") else seen.pop(0)
        block = texts.pop(0) if update.kind.startswith("likelihood") else None
        repetition_loss(model, update.kind, config, block, prefixes, written).backward()
        most = config.max_grad_norm if update.kind in ("policy", "both") else math.inf
        norm = clip(parameters, most)
        assert update.gradient == pytest.approx(norm, rel=1e-4)
        clipped += norm > most
        adam.step(parameters, 1e-3 * (1 - number / config.updates), lambda name: 0.1 * (parameters[name].dim() > 1))
    assert clipped or arm in ("likelihood", "unlikelihood-token", "unlikelihood")
    for name, p in parameters.items():
        torch.testing.assert_close(policy.trained[name].double(), p.detach(), rtol=1e-4, atol=2e-5)


def test_steps_of_a_language_model(monkeypatch):
    """Cross-entropy of every next token, clipping at 1, AdamW (0.9, 0.95), a rise over a tenth and a cosine's fall."""
    config = PretrainConfig(
        d_model=16, heads=2, d_k=4, mlp=16, vocabulary=40, block_tokens=4, batch=1, tokens=20 * 4, readings=1,
        weight_decay=0.1,
    )  # fmt: skip
    blocks = torch.randint(40, (30, 5), generator=torch.Generator().manual_seed(0))
    chosen, batch_of = [], pretraining.batch_of
    monkeypatch.setattr(pretraining, "batch_of", lambda *args: chosen.append(batch_of(*args)) or chosen[-1])
    run = pretrain(config, "rebased", blocks, blocks[:4], learning_rate=0.02, seed=3)
    torch.manual_seed(3)
    model = pretraining.LanguageModel(config.model("rebased")).double()
    parameters = dict(model.named_parameters())
    adam = AdamW((0.9, 0.95))
    assert len(chosen) == 20
    clipped = 0
    for step, rows in enumerate(chosen):
        ids = blocks[rows]
        log_p = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
        (-log_p.mean()).backward()
        clipped += clip(parameters, 1.0) > 1
        rate = 0.02 * (step + 1) / 2 if step < 2 else 0.01 * (1 + math.cos(math.pi * (step - 2) / 18))
        adam.step(parameters, rate, lambda name: 0.1 * (parameters[name].dim() > 1))
    assert clipped
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.double(), parameters[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("arm", ["topk-8", "hierarchical-8"])
def test_steps_of_a_sparse_autoencoder(arm):
    """k latents of highest pre-activation; mean square error of all k, or of every prefix; the gradient along decoder
    rows is taken out, rows are of length 1 after each step; Adam (0.7, 0.999); the rate by the dictionary's size, up
    over a twentieth and down over four fifths."""
    config = SAEConfig(latents=64, batch=16, dead_after=10**9, precision="float32")
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30, 16, 12, generator=generator)
    learner = _learner(Run(Sparse.parse(arm), 1e-2), config, 12, 30, 5, "cpu")
    p = {name: t.detach().double().clone().requires_grad_() for name, t in learner.sae.named_parameters()}
    adam, size = AdamW((0.7, 0.999)), 1e-2 / math.sqrt(64 / 2**14)
    assert torch.allclose(p["W_dec"].norm(dim=1), torch.ones(64, dtype=torch.float64), atol=1e-6)
    for number, x in enumerate(data, 1):
        found = learner.step(x, number)
        pre = torch.relu(x.double() @ p["W_enc"].T + p["b_enc"])
        values, indices = pre.topk(8, dim=1)
        parts = (values[..., None] * p["W_dec"][indices]).cumsum(dim=1) + p["b_dec"]
        errors = (parts - x.double()[:, None]).square().mean(dim=(0, 2))
        loss = errors[-1] if arm.startswith("topk") else errors.mean()
        loss.backward()
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        with torch.no_grad():
            W = p["W_dec"]
            W.grad -= (W.grad * W).sum(dim=1, keepdim=True) * W
        rate = min(1.0, number / 1.5, (31 - number) / 24)
        adam.step(p, size * rate, lambda name: 0.0)
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    for name, t in learner.sae.named_parameters():
        torch.testing.assert_close(t.detach().double(), p[name].detach(), rtol=1e-3, atol=1e-4)


def test_the_formulas_here_by_hand():
    marked, different = repeats([1, 2, 1, 2, 3], 2)
    assert marked == [False, False, True, True, False]  # 12 21 12 23: the second 12
    assert different == 3 / 4
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    x.grad = torch.tensor([3.0], dtype=torch.float64)
    AdamW((0.9, 0.99)).step({"x": x}, 0.1, lambda name: 0.5)
    assert x.item() == pytest.approx(0.95 - 0.1)  # the first step is the sign of the gradient
