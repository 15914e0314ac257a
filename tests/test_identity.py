"""An identity is made of contents: what differs in them differs, what does not is the same, and each part is named."""

import json
import os
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.identity import difference, digest, identify, machine
from trimtab.pretrained import load_model


@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    name: str = "one"


class Weights(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), value))


def named(a):
    return a


def other(a):
    return a


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        ("1", 1),
        (None, "None"),
        (0.1, 0.1 + 1e-17 + 1e-16),
        (float("nan"), float("inf")),
        (0.0, -0.0),
        ("x" * 100, "x" * 99 + "y"),
        ([1, 2], [2, 1]),
        ([[1], [2]], [[1, 2]]),
        (list(range(100)), [*range(99), 0]),
        ({1: "a"}, {"1": "a"}),
        ({"a": None}, {}),
        ({1, 2}, {1, 3}),
        (b"ab", b"ac"),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, dtype=torch.bfloat16), torch.full((3,), 1e-3, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
        (torch.tensor(float("nan")), torch.tensor(float("inf"))),
        (np.zeros(3), np.zeros(3, dtype=np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [1, 3]})),
        (pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"b": [1, 2]})),
        (pl.DataFrame({"a": ["x", None]}), pl.DataFrame({"a": ["x", ""]})),
        (pl.DataFrame({"a": [[1], [2, 3]]}), pl.DataFrame({"a": [[1, 2], [3]]})),
        (pl.Series([1, 2]), pl.Series([2, 1])),
        (Weights(1.0), Weights(2.0)),
        (Config(), Config(rate=0.2)),
        (named, other),
        (torch.float32, torch.bfloat16),
        (range(3), range(4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_contents_that_differ_have_identities_that_differ(one, another):
    assert digest(identify(part=one)) != digest(identify(part=another))
    assert digest(one) != digest(another)
    assert difference(identify(part=one), identify(part=another)).startswith("part")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).view(3, 4),
        lambda: torch.arange(12.0).view(4, 3).T.contiguous().T,
        lambda: np.arange(12.0),
        lambda: pl.DataFrame({"a": [[1], [2, 3]], "b": ["x", "y"]}),
        lambda: {"b": 1, "a": [2, {"c": torch.ones(2)}]},
        lambda: Weights(1.0),
        lambda: {"x", "y", "z"},
        Config,
    ],
)
def test_equal_contents_have_one_identity(make):
    assert identify(part=make()) == identify(part=make())


def test_what_does_not_change_contents_changes_nothing():
    whole = torch.arange(24.0).view(4, 6)
    assert digest(whole[:, ::2]) == digest(whole[:, ::2].clone()), "strides"
    assert digest(torch.nn.Parameter(whole)) != digest(whole[:2])
    frame = pl.DataFrame({"a": [0, 1, 2, 3], "b": ["w", "x", "y", "z"]})
    assert digest(frame[1:3]) == digest(pl.DataFrame({"a": [1, 2], "b": ["x", "y"]})), "slices"
    assert digest(pl.concat([frame[:2], frame[2:]], rechunk=False)) == digest(frame), "chunks"
    assert identify({"a": 1, "b": 2}) == identify({"b": 2, "a": 1}), "the order of keys"
    assert digest((1, (2, 3))) == digest([1, [2, 3]]), "YAML knows no tuples"


def test_a_path_is_what_it_holds_not_its_name_length_or_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep/file").write_text("text", encoding="utf-8")
    same = identify(text=tmp_path / "one")
    assert identify(text=tmp_path / "other") == same
    file = tmp_path / "one/deep/file"
    os.utime(file, (1, 1))
    assert identify(text=tmp_path / "one") == same
    times = file.stat()
    file.write_text("TEXT", encoding="utf-8")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identify(text=tmp_path / "one") != same, "of equal length and time"
    file.rename(tmp_path / "one/deep/renamed")
    file.with_name("renamed").write_text("text", encoding="utf-8")
    assert identify(text=tmp_path / "one") != same, "a name inside is part of the contents"
    with pytest.raises(InputError, match=r"absent is missing"):
        identify(text=tmp_path / "absent")


def test_parts_can_be_read_and_survive_json():
    found = identify(Config(), {"steps": 5, "deep": {"er": [1, 2]}}, "given", data=torch.ones(2), size=np.float64(2))
    assert found == {
        "rate": 0.1, "sizes": [1, 2], "name": "one", "steps": 5, "deep.er": [1, 2], "identity2": "given",
        "data": found["data"], "size": 2.0,
    }  # fmt: skip
    assert found["data"].startswith("sha256:")
    assert json.loads(json.dumps(found)) == found
    assert identify(found) == found, "an identity identifies itself"
    assert digest(json.loads(json.dumps(found))) == digest(found)


def test_of_two_parts_that_are_called_the_same_both_count():
    both = identify({"rate": 1}, {"rate": 2})
    assert sorted(both.values()) == [1, 2]
    assert identify({"rate": 2}, {"rate": 2}) != both


def test_a_difference_is_one_line_that_names_values_where_they_can_be_read():
    there = identify(threads=2, text=torch.ones(2), gone=1, same=3)
    here = identify(threads=1, text=torch.zeros(2), new="x", same=3)
    told = ["gone 1 there, absent here", "new absent there, x here", "text", "threads 2 there, 1 here"]
    assert difference(there, here) == "; ".join(told)
    many = difference({}, {f"part {i}": i for i in range(9)})
    assert many.endswith("; and 5 more")
    assert "\n" not in difference({"a": "x\ny"}, {"a": "z"})


@pytest.mark.parametrize(
    "thing", [object(), iter([1]), (x for x in [1]), open, lambda: 1], ids=lambda v: type(v).__name__
)
def test_what_has_no_contents_is_refused_and_code_is_not(thing):
    if callable(thing):
        assert identify(part=thing)["part"].startswith("sha256:")
        return
    for inside in (thing, [thing], {"a": thing}):
        with pytest.raises(InputError, match=f"contents of a {type(thing).__qualname__} are unknown: give numbers"):
            identify(part=inside)


def test_the_machine_is_threads_processor_and_versions():
    found = machine("cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["device"].startswith("cpu ")
    assert found["torch"] == torch.__version__
    assert {"numpy", "transformers"} <= found.keys()


def test_a_model_is_known_by_its_weights_and_settings(model_folder, tmp_path):
    model = load_model(model_folder)
    before = identify(model=model)
    assert identify(model=load_model(model_folder)) == before, "wherever it was read from"
    model.save_pretrained(tmp_path / "elsewhere")
    assert identify(model=load_model(tmp_path / "elsewhere")) == before
    model.config.rms_norm_eps = 0.5
    assert identify(model=model) != before
    model = load_model(model_folder)
    with torch.no_grad():
        next(model.parameters())[0, 0].add_(1)
    assert identify(model=model) != before
