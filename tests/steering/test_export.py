"""Steering vectors to files and back: safetensors tied to a model, GGUF control vectors."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file

from trimtab.checkpoint import METADATA, load_tensors, save_tensors, write_json
from trimtab.errors import InputError
from trimtab.steering.export import export_gguf, identify, load_vectors, save_vectors
from trimtab.steering.vectors import SteeringVectors


def filled(layers, place="block", rank=None, width=16):
    made = SteeringVectors(layers, width, place=place, rank=rank, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    made.scale = 0.7
    return made


@pytest.fixture
def saved(model_folder, tmp_path):
    path = tmp_path / "vectors.safetensors"
    save_vectors(path, filled([0, 2]), model_folder)
    return path


@pytest.fixture
def another(model_folder, tmp_path):
    """The same model, one weight changed."""
    folder = tmp_path / "another"
    shutil.copytree(model_folder, folder)
    tensors, _ = load_tensors(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    return folder


def edit(path, change):
    """Rewrite a saved file, its tensors and its record passed through `change`."""
    tensors, metadata = load_tensors(path)
    record = json.loads(metadata["record"])
    tensors = change(tensors, record) or tensors
    save_tensors(path, tensors, metadata | {"record": json.dumps(record)})


@pytest.mark.parametrize(
    ("layers", "place", "rank"), [((0, 1, 2), "block", None), ((2,), "mlp", None), ((0, 2), "attention", 2)]
)
def test_vectors_come_back_bit_for_bit(model_folder, tmp_path, layers, place, rank):
    made, path = filled(layers, place, rank), tmp_path / "vectors.safetensors"
    save_vectors(path, made, model_folder)
    before = torch.get_rng_state()
    back = load_vectors(path, model_folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert (back.layers, back.place, back.rank, back.scale) == (layers, place, rank, 0.7)
    assert torch.equal(back.vectors(), made.vectors())
    assert all(parameter.requires_grad for parameter in back.parameters())
    first = path.read_bytes()
    save_vectors(path, back, model_folder)
    assert path.read_bytes() == first


def test_the_digest_that_was_recorded_is_believed(model_folder, another):
    assert identify(model_folder).weights != identify(another).weights
    source = {"source": "hub:a/b@c", "revision": "c", "sha256": "f" * 64, "licence": "", "citation": "", "note": ""}
    write_json(another / "source.json", source)
    assert identify(another).weights == "f" * 64


def test_shards_are_part_of_the_identity(tiny_llama, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        tiny_llama.save_pretrained(folder, max_shard_size="10KB")
    assert not (folders[0] / "model.safetensors").exists()
    assert identify(folders[0]) == identify(folders[1])
    shard = sorted(folders[1].glob("*.safetensors"))[-1]
    tensors, _ = load_tensors(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, str(shard), {"format": "pt"})
    assert identify(folders[0]) != identify(folders[1])


def test_vectors_of_another_model_are_refused(saved, another, model_folder, tmp_path):
    load_vectors(saved)
    with pytest.raises(InputError, match=f"weights expected .*found {identify(another).weights}"):
        load_vectors(saved, another)
    for key, value, message in (
        ("model_type", "smollm3", "architecture expected llama, found smollm3"),
        ("num_hidden_layers", 2, "layers expected 3, found 2"),
        ("hidden_size", 32, "d_model expected 16, found 32"),
    ):
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        write_json(another / "config.json", config | {key: value})
        with pytest.raises(InputError, match=message):
            load_vectors(saved, another)
    write_json(another / "config.json", {"model_type": "unheard-of"})
    with pytest.raises(InputError, match="describes no model"):
        load_vectors(saved, another)
    (another / "model.safetensors").unlink()
    shutil.copy(model_folder / "config.json", another / "config.json")
    with pytest.raises(InputError, match=r"holds no \.safetensors weights"):
        load_vectors(saved, another)
    with pytest.raises(InputError, match="not a model folder"):
        load_vectors(saved, tmp_path / "nowhere")


def test_damaged_and_foreign_files_are_refused(saved, tmp_path):
    with pytest.raises(InputError, match="missing"):
        load_vectors(tmp_path / "nothing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3, 16)}, str(foreign))
    with pytest.raises(InputError, match="not a file that save_vectors wrote"):
        load_vectors(foreign)
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"W_enc": torch.zeros(2, 2)}, {"config": "{}"})
    with pytest.raises(InputError, match="not a file that save_vectors wrote"):
        load_vectors(other)
    whole = saved.read_bytes()
    assert METADATA.encode() in whole
    saved.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_vectors(saved)
    saved.write_bytes(whole)
    tensors, metadata = load_tensors(saved)
    save_tensors(saved, tensors, metadata | {"version": "9"})
    with pytest.raises(InputError, match="format version 9"):
        load_vectors(saved)


def test_wrong_shapes_and_records_are_refused(saved):
    whole = saved.read_bytes()
    changes = {
        "shapes": [
            lambda tensors, record: {"weight": torch.zeros(2, 17)},
            lambda tensors, record: {"weight": torch.zeros(3, 16)},
            lambda tensors, record: {"A": torch.zeros(2, 1), "B": torch.zeros(1, 16)},
            lambda tensors, record: record.update(rank=1),
        ],
        "record cannot be read": [
            lambda tensors, record: record.pop("scale") and None,
            lambda tensors, record: record["model"].update(more=1),
            lambda tensors, record: record.update(layers=[1, 1]),
            lambda tensors, record: record.update(place="nowhere"),
        ],
        "model has 0 to 2": [lambda tensors, record: record.update(layers=[1, 3])],
        "not finite": [lambda tensors, record: {"weight": torch.full((2, 16), torch.nan)}],
    }
    for message, all_of_them in changes.items():
        for change in all_of_them:
            saved.write_bytes(whole)
            edit(saved, change)
            with pytest.raises(InputError, match=message):
                load_vectors(saved)


def test_vectors_that_do_not_fit_are_not_written(model_folder, tmp_path):
    path = tmp_path / "vectors"
    for made, message in (
        (filled([0, 3]), "at layers .0, 3., but the model has 0 to 2"),
        (filled([0], width=8), "8 entries, but the model's width is 16"),
    ):
        with pytest.raises(InputError, match=message):
            save_vectors(path, made, model_folder)
        with pytest.raises(InputError, match=message):
            export_gguf(made, model_folder, path)
    assert not path.exists()


def read_gguf(path):
    """Fields, and {block: what is added after it}, by the rules of llama.cpp for names, types and shapes."""
    reader = gguf.GGUFReader(path)
    directions = {}
    for tensor in reader.tensors:
        word, _, layer = tensor.name.partition(".")
        assert word == "direction"
        assert int(layer) > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        directions[int(layer)] = torch.from_numpy(tensor.data.copy())
    return {name: reader.get_field(name).contents() for name in reader.fields}, directions


@pytest.mark.parametrize("rank", [None, 1])
def test_a_control_vector_reads_back(model_folder, tmp_path, rank):
    made, path = filled([1, 2], rank=rank), tmp_path / "control.gguf"
    export_gguf(made, model_folder, path)
    fields, directions = read_gguf(path)
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert sorted(directions) == [1, 2]
    torch.testing.assert_close(torch.stack([directions[1], directions[2]]), made.vectors().detach(), rtol=0, atol=0)


def test_every_block_above_the_first_has_a_direction(model_folder, tmp_path):
    made = filled([1])
    export_gguf(made, model_folder, tmp_path / "control.gguf")
    directions = read_gguf(tmp_path / "control.gguf")[1]
    assert torch.equal(directions[1], made.vectors()[0])
    assert directions[2].eq(0).all()


def test_what_llama_cpp_cannot_add_is_refused(model_folder, tmp_path):
    path = tmp_path / "control.gguf"
    made = filled([0, 2])
    with pytest.raises(InputError, match="after block 0"):
        export_gguf(made, model_folder, path)
    assert not path.exists()
    export_gguf(made, model_folder, path, leave_out_first=True)
    assert torch.equal(read_gguf(path)[1][2], made.vectors()[1])
    for place in ("mlp", "attention"):
        with pytest.raises(InputError, match=place):
            export_gguf(filled([1], place), model_folder, path)
    with pytest.raises(InputError, match="Nothing is left"):
        export_gguf(filled([0]), model_folder, path, leave_out_first=True)
    with torch.no_grad():
        made.weight[0] = 0  # there, but adds nothing
    export_gguf(made, model_folder, path)
