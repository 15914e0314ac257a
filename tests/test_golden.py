"""Whole training steps against formulas written down here: loss by the model's own logits and autograd, clipping, the
learning rate's schedule and AdamW in fp64 by hand. What any part of a step gets wrong shows in the parameters."""

import copy
import math

import pytest
import torch

from trimtab.rebased import mqar_training, pretraining
from trimtab.rebased.mqar import IGNORED
from trimtab.rebased.mqar_training import Job, MQARConfig, train_recall
from trimtab.rebased.pretraining import PretrainConfig, pretrain
from trimtab.repetition import training as repetition
from trimtab.repetition.arms import Arm
from trimtab.repetition.config import TrainingConfig
from trimtab.rl import training as rl
from trimtab.rl.config import RLConfig
from trimtab.rl.rollouts import Rollouts
from trimtab.sae.config import Arm as Sparse
from trimtab.sae.config import SAEConfig
from trimtab.sae.training import Run, _learner
from trimtab.steering import arms as steering

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


def normalised(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def language_model(p, ids, mixers, heads):
    """Logits of ReBased's language model, layer by layer as the papers write it, from parameters by name."""
    time = ids.shape[1]
    x = p["embedding.weight"][ids]
    if "positions.weight" in p:
        x = x + p["positions.weight"][:time]
    for i, mixer in enumerate(mixers):
        part = {
            name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")
        }
        h = normalised(x, part["norm.weight"], part["norm.bias"])
        if mixer == "conv":
            before = torch.cat([torch.zeros_like(h[:, :2]), h], dim=1)
            taps = part["mixer.conv.weight"][:, 0]
            mixed = sum(before[:, j : j + time] * taps[:, j] for j in range(3)) + part["mixer.conv.bias"]
            x = x + mixed * (h @ part["mixer.projection.weight"].T + part["mixer.projection.bias"]) + h
        else:
            q, k = (
                normalised(h @ part[f"mixer.{n}.weight"].T, part[f"mixer.gamma_{n}"], part[f"mixer.beta_{n}"])
                for n in "qk"
            )
            q, k, v = (each.unflatten(2, (heads, -1)) for each in (q, k, h @ part["mixer.v.weight"].T))
            weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])).square().tril()
            out = torch.einsum("bhqk,bkhd->bqhd", weights / (weights.sum(-1, keepdim=True) + 1e-12), v)
            x = x + out.flatten(2) @ part["mixer.out.weight"].T
        if "mlp.wide.weight" in part:
            wide = normalised(x, part["mlp.norm.weight"], part["mlp.norm.bias"]) @ part["mlp.wide.weight"].T
            gate, value = wide.chunk(2, dim=-1)
            x = x + (gate * gate.sigmoid() * value) @ part["mlp.out.weight"].T
    return normalised(x, p["norm.weight"], p["norm.bias"]) @ p["embedding.weight"].T


def steps_of_a_language_model(make, mixers, heads, batches, rate, beta):
    """Parameters after a step on each (ids, labels): cross-entropy, clipping at 1, AdamW, a rise over a tenth of the
    steps and a cosine's fall."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in make().named_parameters()}
    adam, clipped, total = AdamW((0.9, beta)), 0, len(batches)
    for step, (ids, labels) in enumerate(batches):
        log_p = language_model(parameters, ids, mixers, heads).log_softmax(-1)
        at = labels != IGNORED
        (-log_p[at].gather(1, labels[at][:, None]).mean()).backward()
        clipped += clip(parameters, 1.0) > 1
        warm = total / 10
        now = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        adam.step(parameters, rate * now, lambda name: 0.1 * (parameters[name].dim() > 1))
    assert clipped, "the clip was never tried"
    return parameters


def test_steps_of_a_language_model(monkeypatch):
    config = PretrainConfig(
        d_model=16, heads=2, d_k=4, mlp=16, vocabulary=40, block_tokens=4, batch=1, tokens=20 * 4, readings=1,
        weight_decay=0.1,
    )  # fmt: skip
    blocks = torch.randint(40, (30, 5), generator=torch.Generator().manual_seed(0))
    chosen, batch_of = [], pretraining.batch_of
    monkeypatch.setattr(pretraining, "batch_of", lambda *args: chosen.append(batch_of(*args)) or chosen[-1])
    run = pretrain(config, "rebased", blocks, blocks[:4], learning_rate=0.02, seed=3)
    assert len(chosen) == 20

    def make():
        torch.manual_seed(3)
        return pretraining.LanguageModel(config.model("rebased"))

    batches = [(blocks[rows, :-1], blocks[rows, 1:]) for rows in chosen]
    expected = steps_of_a_language_model(make, config.model("rebased").mixers, 2, batches, 0.02, 0.95)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name].detach(), rtol=2e-3, atol=2e-4)


def test_steps_of_recall(monkeypatch):
    """Rows of more and more pairs; the loss is of the queries alone."""
    config = MQARConfig(
        tasks=[[32, 8]], vocabulary=24, heads=2, steps=20, batch=3, valid_rows=2, test_rows=2, readings=1
    )
    job = Job("rebased", 32, 8, 16, 4, 0.02, 5)
    seen, recall = [], mqar_training.recall
    monkeypatch.setattr(mqar_training, "recall", lambda *args: seen.append((args, recall(*args))) or seen[-1][1])
    model, _ = train_recall(config, job)
    batches = [(rows.inputs, rows.labels) for (rows_, *_), rows in seen if rows_ == 3]
    assert [int((labels != IGNORED).sum()) // 3 for _, labels in batches] == [4] * 6 + [8] * 14

    def make():
        torch.manual_seed(5)
        return mqar_training.LanguageModel(config.model(job))

    expected = steps_of_a_language_model(make, ("conv", "rebased"), 2, batches, 0.02, 0.999)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name].detach(), rtol=2e-3, atol=2e-4)


def drawn_for(number):
    """Made-up rollouts of an update: two prompts of unequal length, three completions of each, some cut short by the
    end-of-sequence token 1; and what each earns. In the second nothing is learnt, for all that was judged earned 2."""
    generator = torch.Generator().manual_seed(number)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids = torch.randint(60, 90, (2, 3, 4), generator=generator)
    lengths = torch.randint(1, 5, (2, 3), generator=generator)
    mask = torch.arange(4) < lengths[..., None]
    finished = lengths < 4
    ids[finished, lengths[finished] - 1] = 1
    rewards = torch.randint(3, (2, 3), generator=generator).float()
    if number in (2, 4):
        rewards[1, 1] = math.nan  # it could not be judged
    return Rollouts(prompts, ids * mask, mask, finished, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), rewards


def advantages_of(rewards, estimator, baseline):
    """For the rewards of a group; those that are no number are of completions that were not judged."""
    kept = [r for r in rewards if r == r]
    if estimator == "reinforce_with_baseline":
        return [r - baseline if r == r else 0.0 for r in rewards]
    mean = sum(kept) / len(kept)
    spread = math.sqrt(sum((r - mean) ** 2 for r in kept) / (len(kept) - 1))
    found = []
    for r in rewards:
        if r != r or spread == 0:
            found.append(0.0)
        elif estimator == "rloo":
            found.append(r - (sum(kept) - r) / (len(kept) - 1))
        else:
            found.append((r - mean) / (spread + 1e-4))
    return found


@pytest.mark.parametrize(
    ("arm", "settings"),
    [
        ("steering", {}),
        ("steering", {"estimator": "grpo", "kl": 0.3, "temperature": 0.7}),
        ("steering-layer1", {"estimator": "reinforce_with_baseline", "warm_up": 0.5}),
        ("steering-last", {"steps_per_batch": 3, "clip": 0.02, "kl": 0.1}),
        ("full", {"steps_per_batch": 2, "clip": 0.01}),
    ],
)
def test_updates_by_policy_gradient(model_folder, monkeypatch, arm, settings):
    """Each completion in a pass of its own; vectors added by hooks after their blocks; the PPO clip, Schulman's k3, the
    norm's clip, Adam and the rise of the rate written down here."""
    config = RLConfig(
        updates=6, prompts=2, group=3, max_new_tokens=4, **({"warm_up": 0.4, "max_grad_norm": 0.02} | settings)
    )
    policy = steering.Arm(arm).policy(str(model_folder), dtype="float32", device="cpu").policy
    model = copy.deepcopy(policy.view._module).double().requires_grad_(arm == "full")
    frozen = copy.deepcopy(model).requires_grad_(False)
    count = []

    def rollout(*_, **__):
        count.append(0)
        return drawn_for(len(count))[0]

    monkeypatch.setattr(rl, "rollout", rollout)
    rate = 0.002 if arm == "full" else 0.05
    history = rl.train(
        policy, [[5, 6, 7], [8, 9, 10, 11, 12]], lambda *_: drawn_for(len(count))[1], config, learning_rate=rate,
        seed=0, end=[1],
    )  # fmt: skip
    parameters = dict(model.named_parameters())
    if arm != "full":
        layers = {"steering": [0, 1, 2], "steering-layer1": [1], "steering-last": [2]}[arm]
        parameters = {"weight": torch.zeros(len(layers), 16, dtype=torch.float64, requires_grad=True)}
        for i, layer in enumerate(layers):
            model.model.layers[layer].register_forward_hook(lambda _, __, out, i=i: out + parameters["weight"][i])

    def log_probs(of, drawn):
        found = []
        for p, prompt in enumerate(drawn.prompts):
            for m in range(3):
                text = drawn.completions[p, m][drawn.mask[p, m]]
                logits = of(torch.cat([torch.tensor(prompt), text])[None]).logits[0, len(prompt) - 1 : -1]
                found.append((logits / config.temperature).log_softmax(-1).gather(1, text[:, None])[:, 0])
        return found

    adam, baseline, clipped, cut = AdamW((0.9, 0.999)), 0.0, 0, 0
    for number, update in enumerate(history, 1):
        drawn, rewards = drawn_for(number)
        mean = rewards.nanmean().item()
        weights = [a for row in rewards.tolist() for a in advantages_of(row, config.estimator, baseline)]
        if number == 2:
            weights = [0.0] * 6
        baseline = mean if number == 1 else 0.9 * baseline + 0.1 * mean
        with torch.no_grad():
            old, reference = log_probs(model, drawn), log_probs(frozen, drawn)
        norm = 0.0
        for _ in range(config.steps_per_batch if any(weights) or config.kl else 0):
            loss = 0.0
            for a, now, before, ref in zip(weights, log_probs(model, drawn), old, reference, strict=True):
                if config.steps_per_batch == 1:
                    loss = loss - (a * now).sum()
                else:
                    ratio = (now - before).exp()
                    cut += int(((ratio - 1).abs() > config.clip).sum())
                    loss = loss - torch.minimum(ratio * a, ratio.clamp(1 - config.clip, 1 + config.clip) * a).sum()
                loss = loss + config.kl * ((ref - now).exp() - 1 - (ref - now)).sum()
            (loss / int(drawn.mask.sum())).backward()
            norm = clip(parameters, config.max_grad_norm)
            clipped += norm > config.max_grad_norm
            adam.step(parameters, rate * min(1.0, number / (config.warm_up * 6)), lambda name: 0.0)
        assert update.reward == pytest.approx(mean)
        assert update.gradient == pytest.approx(norm, rel=2e-3, abs=1e-7)
    assert clipped, "the norm's clip was never tried"
    assert cut or config.steps_per_batch == 1, "the ratio's clip was never tried"
    for name, p in policy.trained.items():
        torch.testing.assert_close(p.detach().double(), parameters[name].detach(), rtol=1e-3, atol=2e-5)


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
