"""The language model: generation is the whole forward pass, its state does not grow, it saves, loads and compiles."""

import jaxtyping
import pytest
import torch

from trimtab.errors import InputError
from trimtab.rebased.decoding import generate
from trimtab.rebased.model import LanguageModel, ModelConfig

PATTERNS = {
    "rebased": ("conv", "rebased"),
    "based": ("conv", "based"),
    "softmax": ("conv", "softmax"),
    "hybrid": ("conv", "rebased", "window"),
}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


@pytest.fixture(params=PATTERNS)
def model(request):
    torch.manual_seed(0)
    positions = 64 if request.param == "based" else 0
    made = LanguageModel(ModelConfig(11, 16, PATTERNS[request.param], 2, 4, window=3, mlp=24, positions=positions))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.double().eval()


def test_generation_is_that_of_the_whole_forward_pass(model):
    found = generate(model, PROMPTS, 12)
    for prompt, new in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert new == ids[len(prompt) :]


def test_it_ends_at_the_end_token(model):
    whole = generate(model, PROMPTS, 12)
    end = whole[1][4]
    assert generate(model, PROMPTS, 12, end=end) == [new[: new.index(end)] if end in new else new for new in whole]


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(5, 8, ("rebased",), 1, 2)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(60)
    drawn = generate(model, [[1, 2]] * 4000, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    expected = (model(torch.tensor([[1, 2]]))[0, -1] / 2).softmax(0)
    shares = torch.bincount(torch.tensor(drawn).flatten(), minlength=5) / 4000
    assert torch.allclose(shares, expected, atol=0.03)
    few = generate(model, [[1, 2]] * 200, 1, temperature=2.0, top_k=2, generator=torch.Generator().manual_seed(0))
    assert {token for (token,) in few} <= set(expected.topk(2).indices.tolist())


def test_the_state_does_not_grow_with_the_context():
    model = LanguageModel(ModelConfig(11, 16, PATTERNS["hybrid"], 2, 4, window=3)).eval()
    sizes = []
    for time in (20, 200):
        cache = model.empty_cache()
        model.hidden(torch.ones(1, time, dtype=torch.long), None, cache)
        sizes.append(sum(t.numel() for part in cache for t in part.values()))
    assert sizes[0] == sizes[1]
    assert model.state_size() == 2 * 10 * (8 + 1)


def test_it_is_loaded_as_it_was_saved(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = LanguageModel.load(tmp_path / "model").double()
    assert loaded.config == model.config
    again = LanguageModel.load(tmp_path / "model")
    assert all(torch.equal(a, b.float()) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(InputError, match="no language model"):
        LanguageModel.load(tmp_path)


def test_it_runs_under_torch_compile(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Dynamo does not see through its checks
    model = model.float()
    ids = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(ids), model(ids), atol=1e-4)
    compiled(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input_is_named():
    with pytest.raises(InputError, match="'rebsed' is not a mixer"):
        ModelConfig(11, mixers=("rebsed",))
    model = LanguageModel(ModelConfig(11, positions=4))
    with pytest.raises(InputError, match="4 positions: a row of 5 tokens"):
        model(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(InputError, match="at least one token"):
        generate(model, [[]], 3)
