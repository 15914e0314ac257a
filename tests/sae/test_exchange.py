"""Exchange with other SAE libraries: by their own code where `make peers` has made their environment, and without."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import InputError
from trimtab.marks import MARK
from trimtab.sae import SAE
from trimtab.sae.exchange import export_saelens, import_dictionary_learning, import_saelens, import_sparsify

PEERS = Path(os.environ.get("TRIMTAB_PEERS", Path(__file__).parents[2] / ".venv-peers")) / "bin/python"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""Of fp32, for values of order 1: sums of up to 576 products in another order."""
BUDGETS = (1, 4, 16)
SAELENS = ("topk", "topk-by-norm", "topk-real-shape", "topk-uncentred", "jumprelu", "topk-in-training", "batchtopk",
           "batchtopk-in-training")  # fmt: skip
IMPORTS = {
    **{f"saelens-{name}": import_saelens for name in SAELENS},
    **{f"dictionary_learning-{name}": import_dictionary_learning for name in ("topk", "batchtopk")},
    "sparsify-topk": import_sparsify,
}


def random_sae(d_model: int = 16, latents: int = 64, k: int = 16, *, jump: bool = False) -> SAE:
    """Biases are not zero, encoder and decoder differ, and decoder norms are neither 1 nor equal."""
    generator = torch.Generator().manual_seed(1)
    sae = SAE(d_model, latents, k, jump=jump, generator=generator)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3 * weight.shape[-1] ** -0.5)
        sae.W_dec.mul_(0.5 + torch.rand(latents, 1, generator=generator))
    return sae


def inputs(d_model: int, rows: int = 200) -> torch.Tensor:
    return torch.randn(rows, d_model, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def reconstruct(sae: SAE, k: int | None = None) -> torch.Tensor:
    return sae.decode(sae.encode(inputs(sae.d_model), k))


def untied(sae: SAE, k: int) -> torch.Tensor:
    """Rows of the inputs whose k-th and next latents are further apart than rounding: of the others (one of 200, at 64
    of 4096 latents) another order of summation keeps another latent."""
    pre = inputs(sae.d_model).double() @ sae.W_enc.double().T + sae.b_enc.double()
    top = pre.topk(k + 1).values
    rows = top[:, -2] - top[:, -1] > 1e-5
    assert rows.float().mean() > 0.97
    return rows


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8")) | changes
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def exported(tmp_path) -> Path:
    export_saelens(random_sae(), tmp_path / "sae", 4, model_name="model", hook_name="blocks.0.hook_resid_post")
    return tmp_path / "sae"


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """One run of all libraries: (its folder, what each SAE made of the inputs)."""
    if not PEERS.is_file():
        pytest.skip("the other libraries are not installed: run `make peers`")
    folder = tmp_path_factory.mktemp("exchange")
    of = {"model_name": "model", "hook_name": "blocks.0.hook_resid_post"}
    for k in BUDGETS:
        export_saelens(random_sae(), folder / "exports" / f"topk-{k}", k, **of)
    export_saelens(random_sae(jump=True), folder / "exports" / "jumprelu", **of, metadata={"prepend_bos": True})
    export_saelens(random_sae(576, 4096, 64), folder / "exports" / "real-shape", 32, **of)
    save_file({str(d): inputs(d) for d in (16, 576)}, folder / "inputs.safetensors")
    script = Path(__file__).with_name("peers.py")
    eager = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}  # it would be used wherever triton is installed
    done = subprocess.run([PEERS, script, folder], capture_output=True, encoding="utf-8", check=False, env=eager)
    assert done.returncode == 0, done.stderr
    return folder, load_file(folder / "outputs.safetensors")


class TestAgainstTheLibraries:
    @pytest.mark.parametrize("k", BUDGETS)
    def test_saelens_reads_one_sae_at_each_budget(self, exchanged, k):
        torch.testing.assert_close(exchanged[1][f"topk-{k}"], reconstruct(random_sae(), k), **TOLERANCE)

    def test_saelens_reads_a_jumprelu_sae(self, exchanged):
        torch.testing.assert_close(exchanged[1]["jumprelu"], reconstruct(random_sae(jump=True)), **TOLERANCE)

    def test_saelens_reads_an_sae_of_a_real_shape(self, exchanged):
        sae = random_sae(576, 4096, 64)
        rows = untied(sae, 32)
        torch.testing.assert_close(exchanged[1]["real-shape"][rows], reconstruct(sae, 32)[rows], **TOLERANCE)

    @pytest.mark.parametrize("name", IMPORTS)
    def test_what_they_saved_reconstructs_as_theirs(self, exchanged, name):
        folder, outputs = exchanged
        sae = IMPORTS[name](folder / "imports" / name)
        rows = slice(None) if sae.log_threshold is not None else untied(sae, sae.k)
        torch.testing.assert_close(reconstruct(sae)[rows], outputs[name][rows], **TOLERANCE)
        assert sae.k == (64 if name.endswith(("real-shape", "jumprelu")) else 5)

    def test_the_threshold_of_a_topk_sae_is_kept(self, exchanged):
        sae = import_dictionary_learning(exchanged[0] / "imports" / "dictionary_learning-topk")
        assert sae.thresholds == {5: pytest.approx(0.3)}


class TestRoundTrip:
    @pytest.mark.parametrize("k", BUDGETS)
    def test_topk_comes_back_bit_by_bit(self, tmp_path, k):
        sae = random_sae()
        export_saelens(sae, tmp_path / "sae", k, model_name="model", hook_name="blocks.0.hook_resid_post")
        back = import_saelens(tmp_path / "sae")
        assert back.k == k
        assert back.state_dict().keys() == sae.state_dict().keys()
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in sae.state_dict().items())

    def test_jumprelu_comes_back(self, tmp_path):
        sae = random_sae(jump=True)
        export_saelens(sae, tmp_path / "sae", model_name="model", hook_name="blocks.0.hook_resid_post")
        torch.testing.assert_close(import_saelens(tmp_path / "sae").state_dict(), sae.state_dict())

    def test_a_threshold_of_zero_or_less_is_a_relu(self, tmp_path):
        sae = random_sae(jump=True)
        export_saelens(sae, tmp_path / "sae", model_name="model", hook_name="blocks.0.hook_resid_post")
        weights = load_file(tmp_path / "sae/sae_weights.safetensors")
        save_file(weights | {"threshold": torch.linspace(-1, 0, 64)}, tmp_path / "sae/sae_weights.safetensors")
        pre = inputs(16) @ sae.W_enc.T + sae.b_enc
        expected = torch.relu(pre) @ sae.W_dec + sae.b_dec
        torch.testing.assert_close(reconstruct(import_saelens(tmp_path / "sae")), expected, **TOLERANCE)

    def test_the_layout_is_saelens_own(self, exported):
        assert {path.name for path in exported.iterdir()} == {MARK, "cfg.json", "sae_weights.safetensors"}
        weights = load_file(exported / "sae_weights.safetensors")
        assert {name: list(tensor.shape) for name, tensor in weights.items()} == {
            "W_enc": [16, 64], "b_enc": [64], "W_dec": [64, 16], "b_dec": [16]
        }  # fmt: skip

    def test_a_version_5_configuration_is_understood(self, exported):
        config = json.loads((exported / "cfg.json").read_text(encoding="utf-8"))
        for key in ("k", "metadata", "rescale_acts_by_decoder_norm"):
            del config[key]
        old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
               "normalize_activations": False}  # fmt: skip
        (exported / "cfg.json").write_text(json.dumps(config | old), encoding="utf-8")
        torch.testing.assert_close(reconstruct(import_saelens(exported)), reconstruct(random_sae(), 4))

    def test_decoder_norms_of_zero_give_zeros_and_no_nan(self, exported):
        weights = load_file(exported / "sae_weights.safetensors")
        weights["W_dec"][:60] = 0
        save_file(weights, exported / "sae_weights.safetensors")
        rewrite(exported, rescale_acts_by_decoder_norm=True)
        sae = import_saelens(exported)
        latents = sae.encode(inputs(16))
        assert latents.indices[latents.values > 0].min() >= 60
        assert reconstruct(sae).isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize("k", [0, 65])
    def test_a_budget_outside_the_dictionary(self, tmp_path, k):
        with pytest.raises(InputError, match="between 1 and the dictionary's 64"):
            export_saelens(random_sae(), tmp_path / "sae", k, model_name="model", hook_name="hook")
        assert not list(tmp_path.iterdir())

    def test_a_budget_for_a_jumprelu_sae(self, tmp_path):
        with pytest.raises(InputError, match="leave out k = 4"):
            export_saelens(random_sae(jump=True), tmp_path / "sae", 4, model_name="model", hook_name="hook")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architecture": "gated"}, "'gated': what can be read here are topk, jumprelu and batchtopk"),
            ({"architecture": "standard"}, "'standard'"),
            ({"normalize_activations": "layer_norm"}, "rescales each input by its own norm"),
            ({"normalize_activations": "constant_norm_rescale"}, "rescales each input by its own norm"),
            ({"normalize_activations": "expected_average_only_in"}, "fold them in"),
            ({"normalize_activations": "covariance_whitening"}, "fold them in"),
            ({"normalize_activations": True}, "fold them in"),
            ({"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z'"),
            ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
            ({"architecture": "jumprelu"}, "no tensor threshold"),
        ],
    )
    def test_what_saelens_has_and_we_have_not(self, exported, changes, message):
        rewrite(exported, **changes)
        with pytest.raises(InputError, match=message):
            import_saelens(exported)

    @pytest.mark.parametrize("read", [import_saelens, import_dictionary_learning, import_sparsify])
    def test_a_folder_of_something_else(self, tmp_path, read):
        with pytest.raises(InputError, match="it is not an SAE that"):
            read(tmp_path)

    def test_weights_that_are_missing_or_do_not_fit(self, exported):
        weights = load_file(exported / "sae_weights.safetensors")
        save_file(weights | {"b_enc": torch.zeros(63)}, exported / "sae_weights.safetensors")
        with pytest.raises(InputError, match=r"\[64, 16\], \[63\], \[64, 16\], \[16\]"):
            import_saelens(exported)
        (exported / "sae_weights.safetensors").unlink()
        with pytest.raises(InputError, match=r"sae_weights\.safetensors is missing"):
            import_saelens(exported)

    def test_a_pickle_that_asks_for_more_than_tensors(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}), encoding="utf-8"
        )
        torch.save({"k": Path("anything")}, tmp_path / "ae.pt")
        with pytest.raises(InputError, match="more than tensors"):
            import_dictionary_learning(tmp_path)
        (tmp_path / "ae.pt").write_bytes(b"half a file")
        with pytest.raises(InputError, match=r"more than tensors|damaged"):
            import_dictionary_learning(tmp_path)

    @pytest.mark.parametrize("kind", ["GatedAutoEncoder", "MatryoshkaBatchTopKSAE", None])
    def test_other_classes_of_dictionary_learning(self, tmp_path, kind):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}), encoding="utf-8")
        with pytest.raises(InputError, match="AutoEncoderTopK and BatchTopKSAE"):
            import_dictionary_learning(tmp_path)

    @pytest.mark.parametrize("changes", [{"activation": "groupmax"}, {"transcode": True}, {"skip_connection": True}])
    def test_other_coders_of_sparsify(self, tmp_path, changes):
        (tmp_path / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 5} | changes), encoding="utf-8")
        with pytest.raises(InputError, match="topk autoencoders"):
            import_sparsify(tmp_path)
