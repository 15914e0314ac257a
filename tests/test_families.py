"""Families of models, tiny and random, on everything that touches one: each does what transformers itself computes from
it, padded and not, values and gradients, or is refused in one sentence. `docs/models.md` shows the outcome."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.errors import InputError
from trimtab.interventions import capture, lens, next_tokens, resume, splice, steer, wrap
from trimtab.repetition.decoding import Decoder, continuations
from trimtab.repetition.losses import accumulate as likelihood
from trimtab.rl.adapters import down_projections, inject_lora
from trimtab.rl.gradient import accumulate, check_packing, pack
from trimtab.rl.policy import FullPolicy, Policy
from trimtab.rl.rollouts import rollout

DOCS = Path(__file__).parents[1] / "docs/models.md"
WIDE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 258, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.4}
PLACED = {"max_position_embeddings": 64}
GPT2 = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0}
KEYS = {"num_key_value_heads": 1}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4, "head_dim": 8}
FAMILIES = {
    "Llama": ("LlamaConfig", WIDE | KEYS),
    "GPT-2": ("GPT2Config", GPT2),
    "OPT": ("OPTConfig", WIDE | PLACED | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "GPT-NeoX": ("GPTNeoXConfig", WIDE),
    "Qwen 2": ("Qwen2Config", WIDE | KEYS),
    "Qwen 2, windows": ("Qwen2Config", WIDE | KEYS | MIXED | {"use_sliding_window": True}),
    "Qwen 3": ("Qwen3Config", WIDE | KEYS | {"head_dim": 8}),
    "Gemma 2": ("Gemma2Config", WIDE | KEYS | MIXED | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "Gemma 3": ("Gemma3TextConfig", WIDE | KEYS | MIXED),
    "Mistral": ("MistralConfig", WIDE | KEYS | {"sliding_window": 4}),
    "Granite": ("GraniteConfig", WIDE | KEYS | {"logits_scaling": 16.0, "residual_multiplier": 0.5}),
    "Cohere": ("CohereConfig", WIDE | KEYS | {"logit_scale": 0.0625}),
    "Phi": ("PhiConfig", WIDE),
    "Falcon": ("FalconConfig", WIDE | {"alibi": False, "new_decoder_architecture": False}),
    "Bloom": ("BloomConfig", {"hidden_size": 16, "n_layer": 4, "n_head": 2}),
    "StableLM": ("StableLmConfig", WIDE | KEYS),
    "OLMo 2": ("Olmo2Config", WIDE | KEYS),
    "Mamba": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 4}),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [5, 6, 13, 14, 15]]


def model_of(family: str) -> PreTrainedModel:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TOKENS | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def own(model: PreTrainedModel, ids: list[int], moved: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """The model's own logits of one text, [seq, vocabulary], with vectors added after blocks by plain hooks."""
    blocks = next(part for _, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))

    def hook(vector: torch.Tensor) -> Callable:
        return lambda _, __, out: out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])

    hooks = [blocks[layer].register_forward_hook(hook(vector)) for layer, vector in (moved or {}).items()]
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    finally:
        for each in hooks:
            each.remove()


class Case:
    """A model of a family, a view of it with vectors after its second and last blocks, and the vectors."""

    def __init__(self, family: str, tokenizer) -> None:
        self.family, self.model = family, model_of(family).requires_grad_(False)
        self.wrapped = wrap(self.model, tokenizer)
        self.vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.layers = [1, 3]

    @property
    def view(self):
        return steer(self.wrapped, self.layers, lambda: self.vectors)

    @property
    def moved(self) -> dict[int, torch.Tensor]:
        return dict(zip(self.layers, self.vectors, strict=True))


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        found.float(), expected.float(), atol=2e-4, rtol=2e-4, msg=lambda text: f"{what}: {text}"
    )


def reading(case: Case) -> None:
    """Captured, resumed and spliced, as it is and steered; read by the lens."""
    batch = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    mask = torch.ones_like(batch)
    for view, moved in ((case.wrapped, {}), (case.view, case.moved)):
        whole = torch.stack([own(case.model, row.tolist(), moved) for row in batch]).detach()
        for site in (0, 2, 3):
            residual = capture(view, batch, mask, [site])[site]
            close(resume(view, batch, mask, site, residual), whole, f"resumed at {site}")
            close(splice(view, batch, mask, site, lambda h: h), whole, f"spliced at {site}")
        found = lens(view, batch, targets=next_tokens(batch))
        wanted = whole[:, :-1].log_softmax(2).gather(2, batch[:, 1:, None])[..., 0]
        close(found.target_log_probability[-1][:, :-1], wanted, "lens")


def sampling(case: Case) -> None:
    """Rollouts of unequal prompts with a common beginning."""
    policy = Policy(case.view, {"weight": case.vectors}, case.wrapped)
    drawn = rollout(
        policy, PROMPTS, group=3, max_new_tokens=7, temperature=0.8, end=[1],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for p, prompt in enumerate(PROMPTS):
        for m in range(3):
            ids = drawn.completion(p, m, end=True)
            logits = own(case.model, prompt + ids, case.moved)[len(prompt) - 1 : -1] / 0.8
            expected = logits.log_softmax(1)[range(len(ids)), ids].detach()
            close(drawn.log_probs[p, m][: len(ids)], expected, f"completion {m} of prompt {p}")
    greedy = rollout(Policy(case.wrapped, {}), PROMPTS[:1], group=1, max_new_tokens=6, temperature=0.0, end=[1])
    ids = torch.tensor(PROMPTS[:1])
    generated = case.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert greedy.completion(0, 0, end=True) == generated[0, ids.shape[1] :].tolist()


def training(case: Case) -> None:
    """The packed policy gradient: log-probabilities, and their gradient at the vectors."""
    policy = Policy(case.view, {"weight": case.vectors}, case.wrapped)
    check_packing(policy)
    drawn = rollout(
        policy, PROMPTS, group=2, max_new_tokens=7, temperature=1.0, end=[1],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    weights = torch.randn(drawn.mask.shape, generator=torch.Generator().manual_seed(2))
    packed = pack(drawn, [0, 1, 2])
    chosen = weights[packed.source[:, 0], packed.source[:, 1], packed.source[:, 2]]
    found = accumulate(policy, packed, 1.0, lambda log_probs, chunk: (chosen[chunk] * log_probs).sum())
    gradient, case.vectors.grad = case.vectors.grad, None
    total = torch.zeros(())
    for p, prompt in enumerate(PROMPTS):
        for m in range(2):
            ids = drawn.completion(p, m, end=True)
            logits = own(case.model, prompt + ids, case.moved)[len(prompt) - 1 : -1]
            total = total + (weights[p, m, : len(ids)] * logits.log_softmax(1)[range(len(ids)), ids]).sum()
    close(torch.tensor(found), total.detach(), "loss")
    (expected,) = torch.autograd.grad(total, case.vectors)
    assert gradient is not None
    assert gradient.norm() > 0.01
    close(gradient / expected.norm(), expected / expected.norm(), "gradient")


def texts(case: Case) -> None:
    """Likelihood of rows of one length, with its gradient, and continuations of several decoders."""
    policy = Policy(case.view, {"weight": case.vectors}, case.wrapped)
    rows = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    _, found = likelihood(policy, rows, 1, lambda logits, _: logits.log_softmax(1)[:, 7].sum())
    gradient = case.vectors.grad
    logits = torch.stack([own(case.model, row.tolist(), case.moved)[:-1] for row in rows]).log_softmax(2)
    close(found.view(2, -1), logits.detach().gather(2, rows[:, 1:, None])[..., 0], "likelihood")
    (expected,) = torch.autograd.grad(logits[..., 7].sum(), case.vectors)
    assert gradient is not None
    close(gradient / expected.norm(), expected / expected.norm(), "gradient")
    plain, prefix = Policy(case.wrapped, {}), torch.tensor(PROMPTS[:1])
    options = {"attention_mask": torch.ones_like(prefix), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for decoder, arguments in (
        ("greedy", {}),
        ("beam-3", {"num_beams": 3}),
        ("no-repeat-2", {"no_repeat_ngram_size": 2}),
    ):
        case.model.generation_config.eos_token_id = None  # a token like any other here
        wanted = case.model.generate(prefix, **options, **arguments)[0, prefix.shape[1] :]
        ours = continuations(plain, prefix, 6, Decoder.of(decoder), show=False)[0]
        assert ours.tolist() == wanted.tolist(), decoder


def lora(case: Case) -> None:
    """LoRA on the down projections and on all linear layers begins as the model and moves it."""
    before = own(case.model, PROMPTS[0])
    assert len(down_projections(case.wrapped)) == 4
    for modules in (down_projections(case.wrapped), "all-linear"):
        fresh = wrap(type(case.model)(case.model.config).eval(), case.wrapped.tokenizer)
        fresh._module.load_state_dict(case.model.state_dict())
        trained = inject_lora(fresh, modules, 2, seed=0)
        close(own(fresh._module, PROMPTS[0]), before, "untouched")
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(trained)))
                )
        assert (own(fresh._module, PROMPTS[0]) - before).abs().max() > 1e-3


def full(case: Case) -> None:
    """Every weight, with a penalty to the model as it was, whose own head it reads."""
    base = wrap(model_of(case.family), case.wrapped.tokenizer)
    policy = FullPolicy(wrap(case.model, case.wrapped.tokenizer), base)
    with torch.no_grad():
        for weight in policy.trained.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    policy.publish()
    ids = torch.tensor(PROMPTS[:1])
    places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        now = policy.logits(policy.hidden(ids, torch.ones_like(ids), places))[0]
        then = policy.reference_logits(policy.reference_hidden(ids, torch.ones_like(ids), places))[0]
        close(now, own(case.model, PROMPTS[0]), "trained")
        close(then, own(base._module, PROMPTS[0]), "reference")
    assert (now - then).abs().max() > 1e-2


FEATURES = {
    "read, splice, steer, lens": reading, "sample": sampling, "train by rewards": training,
    "train on texts, decode": texts, "LoRA": lora, "full tuning": full,
}  # fmt: skip


def outcome(family: str, feature: str, tokenizer) -> str:
    try:
        FEATURES[feature](Case(family, tokenizer))
    except InputError as error:
        return "refused" if "\n" not in str(error) else "refused at length"
    return "yes"


def table() -> dict[str, dict[str, str]]:
    """The table of docs/models.md: family -> feature -> yes or refused."""
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| family |"))
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:])
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows[1:] if row[0] in FAMILIES}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_does_or_is_refused_as_the_docs_say(family, feature, tokenizer):
    assert outcome(family, feature, tokenizer) == table()[family][feature]


def test_the_table_names_every_family_and_feature():
    assert set(table()) == set(FAMILIES)
    assert all(set(row) == set(FEATURES) for row in table().values())
    assert re.search(r"A model that is refused", DOCS.read_text(encoding="utf-8"))
