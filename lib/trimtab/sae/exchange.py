"""SAEs of other libraries: ours written for SAELens, theirs read as ours, with the same latents and reconstructions.

| read from | files | architectures |
|---|---|---|
| SAELens | `cfg.json`, `sae_weights.safetensors` | topk, jumprelu, batchtopk |
| dictionary_learning | `config.json`, `ae.pt` | AutoEncoderTopK, BatchTopKSAE |
| sparsify | `cfg.json`, `sae.safetensors` | topk |

A b_dec that they take from the input is folded into b_enc. BatchTopK takes the largest latents of a whole batch in
training only; what is read is a JumpReLU SAE with one threshold for all, as in both libraries. Decoder rows keep their
norms, except where a library ranks latents by activation times norm, which is folded: a plain TopK SAE would choose
other latents once its rows were rescaled. Weights are read as fp32, whatever they were stored in, and "the same" means
up to the rounding of fp32.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.checkpoint import atomic, load_tensors, read_json, save_tensors, write_json
from trimtab.errors import InputError
from trimtab.sae.model import SAE

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_LAYOUT = "6.54.12"
"""Version of SAELens whose layout is written: a file that names none is taken for one of version 5."""


def export_saelens(
    sae: SAE,
    folder: str | Path,
    k: int | None = None,
    *,
    model_name: str,
    hook_name: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the SAE, read at budget `k` (default: its own), as a folder that `sae_lens.SAE.load_from_disk` loads.

    Other files of the folder stay. The SAE must read raw residuals, as saved ones do (`SAE.fold`).
    `model_name` and `hook_name` (`blocks.14.hook_resid_post`) say of what; `metadata` holds further keys of SAELens'
    own, such as `prepend_bos` and `context_size`. Raises InputError for a budget that the SAE cannot be read at, and
    where a file of one of its names is there that Trimtab did not write.
    """
    if sae.log_threshold is not None and k is not None:
        raise InputError(f"A JumpReLU SAE is exported with its thresholds and has no budget: leave out k = {k}.")
    k = sae.k if k is None else k
    if not 1 <= k <= sae.latents:
        raise InputError(f"k must lie between 1 and the dictionary's {sae.latents} latents, not {k}.")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config: dict[str, Any] = {
        "architecture": "topk", "d_in": sae.d_model, "d_sae": sae.latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "model_name": model_name, "hook_name": hook_name},
    }  # fmt: skip
    config["metadata"] |= dict(metadata or {})
    if sae.log_threshold is None:
        config |= {"k": k, "rescale_acts_by_decoder_norm": False}
    else:
        config |= {"architecture": "jumprelu"}
        tensors["threshold"] = sae.log_threshold.exp()
    with atomic(Path(folder), "saelens") as partial:
        partial.mkdir(parents=True)
        save_tensors(partial / SAELENS_WEIGHTS, {name: tensor.float().cpu() for name, tensor in tensors.items()})
        write_json(partial / SAELENS_CONFIG, config)


def import_saelens(folder: str | Path) -> SAE:
    """Read an SAE that SAELens saved (version 5 or later), for inference or as a training checkpoint.

    A JumpReLU SAE has no budget: `k` is that of its training where the file tells it, otherwise the whole dictionary.
    Raises InputError for other architectures, and for inputs normalised in a way that the weights do not hold.
    """
    config = _config(folder, SAELENS_CONFIG, "SAELens")
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":  # as version 5 wrote it
        config |= {"architecture": "topk", "k": config["activation_fn_kwargs"]["k"]}
    architecture = config.get("architecture", "standard")
    if architecture not in ("topk", "jumprelu", "batchtopk"):
        raise _refusal(folder, f"architecture {architecture!r}", "topk, jumprelu and batchtopk")
    _refuse_preprocessing(folder, config)
    tensors = _tensors(Path(folder) / SAELENS_WEIGHTS)
    W_enc, b_enc, W_dec, b_dec = _take(folder, tensors, "W_enc", "b_enc", "W_dec", "b_dec")
    threshold = None
    if architecture != "topk":
        name = "threshold" if architecture == "jumprelu" else "topk_threshold"
        threshold = _take(folder, tensors, name)[0].expand(len(W_dec))
    trained = (config.get("metadata") or {}).get("training_architecture_details") or {}
    k = config.get("k") or trained.get("k")
    centred = config.get("apply_b_dec_to_input", True)
    by_norm = architecture != "jumprelu" and config.get("rescale_acts_by_decoder_norm", False)
    return _assemble(folder, W_enc.T, b_enc, W_dec, b_dec, k=k, threshold=threshold, centred=centred, by_norm=by_norm)


def import_dictionary_learning(folder: str | Path) -> SAE:
    """Read an `AutoEncoderTopK` or a `BatchTopKSAE` that dictionary_learning saved.

    `ae.pt` is a pickle, the only one that Trimtab opens: `torch.load(weights_only=True)` builds tensors and plain
    containers, and refuses a file that asks for anything else. The threshold that a TopK SAE was saved with, the mean
    of its smallest active latents, becomes `thresholds[k]`. Raises InputError for other classes.
    """
    trainer = _config(folder, "config.json", "dictionary_learning").get("trainer") or {}
    kind = trainer.get("dict_class")
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE"):
        raise _refusal(folder, f"dict_class {kind!r}", "AutoEncoderTopK and BatchTopKSAE")
    tensors = _tensors(Path(folder) / "ae.pt")
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k")
    W_enc, b_enc, W_dec, b_dec, k = _take(folder, tensors, *names)
    measured = tensors.get("threshold", torch.tensor(-1.0))  # below zero: never measured
    threshold = measured.expand(len(W_enc)) if kind == "BatchTopKSAE" else None
    sae = _assemble(folder, W_enc, b_enc, W_dec.T, b_dec, k=int(k), threshold=threshold, centred=True)
    if threshold is None and measured >= 0:
        sae.thresholds = {sae.k: float(measured)}
    return sae


def import_sparsify(folder: str | Path) -> SAE:
    """Read a TopK SAE that sparsify saved. Raises InputError for GroupMax, transcoders and skip connections."""
    config = _config(folder, "cfg.json", "sparsify")
    found = [config.get("activation", "topk"), *(name for name in ("transcode", "skip_connection") if config.get(name))]
    if found != ["topk"]:
        raise _refusal(folder, f"a coder with {' and '.join(found)}", "topk autoencoders")
    tensors = _tensors(Path(folder) / "sae.safetensors")
    W_enc, b_enc, W_dec, b_dec = _take(folder, tensors, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    return _assemble(folder, W_enc, b_enc, W_dec, b_dec, k=config.get("k"), centred=True)


@torch.no_grad()
def _assemble(
    folder: str | Path,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    k: int | float | None,
    threshold: Float[Tensor, " latents"] | None = None,
    centred: bool,
    by_norm: bool = False,
) -> SAE:
    """The SAE of W_enc and W_dec [latents, d_model], b_enc [latents], b_dec [d_model].

    `centred`: inputs are taken less b_dec. `by_norm`: latents are activations times the norms of their decoder rows.
    `k` None stands for the whole dictionary. Raises InputError where the shapes do not fit together.
    """
    latents, d_model = W_dec.shape
    if (W_enc.shape, b_enc.shape, b_dec.shape) != ((latents, d_model), (latents,), (d_model,)):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (W_enc, b_enc, W_dec, b_dec))
        raise InputError(f"{folder} holds W_enc, b_enc, W_dec and b_dec of shapes {shapes}, which are of no one SAE.")
    if centred:
        b_enc = b_enc - (W_enc.double() @ b_dec.double()).to(b_enc)
    if by_norm:
        norms = W_dec.norm(dim=1)
        W_enc, b_enc = W_enc * norms[:, None], b_enc * norms
        W_dec = W_dec / norms[:, None].clamp(min=torch.finfo(W_dec.dtype).tiny)
    sae = SAE(d_model, latents, round(k or latents), jump=threshold is not None)
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if threshold is not None:
        weights["log_threshold"] = threshold.clamp(min=0).log()  # where it is -inf, the ReLU alone is left
    sae.load_state_dict(weights)
    return sae.eval()


def _refuse_preprocessing(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Raise InputError where SAELens does something to the inputs that these weights alone cannot."""
    normalised = config.get("normalize_activations") or "none"
    if normalised in ("layer_norm", "constant_norm_rescale"):
        raise _refusal(folder, f"{normalised}, which rescales each input by its own norm,", "linear encoders")
    if normalised != "none":
        raise InputError(
            f"{folder} reads inputs normalised by {normalised}, whose statistics lie elsewhere: fold them in with "
            "SAELens (finish its training, or sae.fold_activation_...) and save it again."
        )
    for name, neutral in (("reshape_activations", "none"), ("finetuning_scaling_factor", False)):
        if config.get(name, neutral) != neutral:
            raise _refusal(folder, f"{name} = {config[name]!r}", f"those with {neutral!r}")


def _refusal(folder: str | Path, what: str, readable: str) -> InputError:
    return InputError(f"{folder} holds an SAE with {what}: what can be read here are {readable}.")


def _config(folder: str | Path, name: str, library: str) -> dict[str, Any]:
    if not (Path(folder) / name).is_file():
        raise InputError(f"{folder} holds no {name}: it is not an SAE that {library} saved.")
    return read_json(Path(folder) / name)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing: the configuration beside it belongs to weights of that name.")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors and is not opened: get it as a plain state dict.") from None
    except (RuntimeError, EOFError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): get it again.") from None


def _take(folder: str | Path, tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """The tensors of these names as fp32."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"{folder} has no tensor {' nor '.join(missing)} among its weights: {sorted(tensors)}.")
    return [tensors[name].float() for name in names]
