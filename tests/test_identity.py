"""An identity is made of contents: what differs in them differs, what does not is the same, and each part is named."""

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from functools import lru_cache, partial, wraps
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.files import read_json, write_json
from trimtab.identity import difference, digest, identify, machine, tell
from trimtab.pretrained import load_model


@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    name: str = "one"


@dataclass(frozen=True)
class Alike(Config):
    pass


@dataclass
class Empty:
    pass


@dataclass
class Alone:
    pass


class Colour(Enum):
    RED = 1
    BLUE = 2


class Size(IntEnum):
    SMALL = 1


Pair = namedtuple("Pair", ["x", "y"])
Point = namedtuple("Point", ["row", "column"])


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x

    def times(self, x):
        return self.factor * x


class Shift(Scale):
    def __call__(self, x):
        return self.factor + x


class Slots:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


def closed(factor):
    return lambda x: factor * x


def nested(factor):
    def outer(x):
        def inner(y):
            return factor * y

        return inner(x)

    return outer


def recursive(factor):
    def down(n):
        return factor if n == 0 else down(n - 1)

    return down


def by_default(factor):
    def function(x, factor=factor):
        return factor * x

    return function


def by_keyword(factor):
    def function(x, *, factor=factor):
        return factor * x

    return function


def with_attribute(factor):
    def function(x):
        return function.factor * x

    function.factor = factor
    return function


def wrapped(factor):
    @wraps(named)
    def function(x):
        return factor * x

    return function


def cached(factor):
    return lru_cache(by_default(factor))


def made_class(factor):
    class Made:
        def times(self, x):
            return factor * x

    return Made


def class_with_value(factor):
    class Made:
        by = factor

    return Made


def typed(factor):
    names: dict = {}
    exec(f"def function(x):\n    'Text.'\n    return x in {{'a', 'b', {factor!r}}} or (lambda: {factor!r})()", names)
    return names["function"]


def with_global(factor):
    names = {"factor": factor}
    exec("def function(x):\n    return [factor * y for y in x] + [(lambda: factor)()]", names)
    return names["function"]


def in_a_table(factor):
    return [lambda x: x + 1, lambda x: x + 2, lambda x: lambda y: x][factor]


MAKERS = [
    closed, nested, recursive, by_default, by_keyword, with_attribute, wrapped, cached, made_class, class_with_value,
    typed, with_global, in_a_table, Scale, Slots, lambda factor: Scale(factor).times,
    lambda factor: partial(named, factor),
    lambda factor: partial(named, a=factor), lambda factor: partial(named, [{"deep": factor}]),
    lambda factor: [factor].count, lambda factor: {"deep": [closed(factor)]}, lambda factor: (Scale(Scale(factor)),),
    lambda factor: Config(rate=closed(factor)), lambda factor: made_class(factor)(), lambda factor: complex(0, factor),
    lambda factor: deque([factor]), lambda factor: Decimal(factor), lambda factor: slice(factor),
    lambda factor: np.random.default_rng(factor), lambda factor: random.Random(factor),
    lambda factor: re.compile(str(factor)),
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("strict", [True, False])
def test_what_functions_and_objects_hold_is_in_their_identity(make, strict):
    found = [digest(make(factor), strict=strict) for factor in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


class Weights(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), value))


def named(a):
    return a


def other(a):
    return a


def quantised(scale):
    return torch.quantize_per_tensor(torch.zeros(2), scale, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
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
        (1, Size.SMALL),
        (Colour.RED, Colour.BLUE),
        (Colour.RED, Size.SMALL),
        (Colour.RED, 1),
        (Pair(1, 2), Point(1, 2)),
        (b"ab", "ab"),
        (b"ab", bytearray(b"ab")),
        ("\ud83d\ude00", "\U0001f600"),
        ({1: "a"}, {True: "a"}),
        ({1: "a"}, {1.0: "a"}),
        ([], {}),
        ([], set()),
        ([], [[]]),
        ([], None),
        ("", None),
        (set(), {0}),
        (float("nan"), None),
        (float("nan"), "nan"),
        (["float", "1.0"], 1.0),
        (np.float32(1), np.float64(1)),
        (np.int64(1), 1),
        (np.bool_(True), True),
        (np.zeros(0), np.zeros((0, 2))),
        (np.array([object, int]), np.array([object, str])),
        (np.ma.masked_array([1, 2], [0, 1]), np.ma.masked_array([1, 2], [1, 0])),
        (np.zeros(2), torch.zeros(2)),
        (np.dtype("f4"), np.dtype("f8")),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor(1), 1),
        (torch.device("cpu"), torch.device("meta")),
        (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        (torch.eye(3).to_sparse_csr(), torch.eye(3).flip(0).to_sparse_csr()),
        (torch.ones(2, dtype=torch.complex64) * 1j, (torch.ones(2, dtype=torch.complex64) * 1j).conj()),
        (quantised(0.1), quantised(0.2)),
        (pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [1.0, 2.0]})),
        (pl.DataFrame({"a": [1], "b": [2]}), pl.DataFrame({"b": [2], "a": [1]})),
        (pl.DataFrame({"a": [None, 1]}), pl.DataFrame({"a": [1, None]})),
        (pl.DataFrame({"a": []}), pl.DataFrame()),
        (pl.Series("a", [1]), pl.DataFrame({"a": [1]})),
        (Scale(1), Shift(1)),
        (Scale, Shift),
        (Scale(1).times, Scale.times),
        (json, math),
        (math.sin, math.cos),
        (len, max),
        (str.upper, str.lower),
        (partial(named), named),
        (partial(named, 1), partial(named, 1, 2)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: lambda y: x, (lambda x: lambda y: x)(1)),
        (np.add, np.multiply),
        (nn.functional.relu, nn.functional.gelu),
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
    assert digest(torch.ones(2, 3).shape) == digest([2, 3])
    assert digest(OrderedDict(b=1, a=2)) == digest({"a": 2, "b": 1})
    assert digest(np.asfortranarray(np.eye(3) + 1)) == digest(np.eye(3) + 1), "strides"
    halves = torch.sparse_coo_tensor([[0, 0]], [1.0, 1.0], (2,), check_invariants=True)
    assert digest(halves) == digest(torch.tensor([2.0, 0.0]).to_sparse()), "entries that add up"
    nulls = frame.select(pl.when(pl.col("a") != 1).then(pl.col("a")))["a"]
    assert digest(nulls) == digest(pl.Series("a", [0, None, 2, 3])), "what lies under a null"
    assert digest(frame["a"].set_sorted()) == digest(frame["a"])
    same = [1]
    assert digest([same, same]) == digest([[1], [1]]), "one thing twice"


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
        "identity": "Config", "rate": 0.1, "sizes": [1, 2], "name": "one", "steps": 5, "deep.er": [1, 2],
        "identity2": "given",        "data": found["data"], "size": 2.0,
    }  # fmt: skip
    assert found["data"].startswith("sha256:")
    assert json.loads(json.dumps(found)) == found
    assert identify(found) == found, "an identity identifies itself"
    assert digest(json.loads(json.dumps(found))) == digest(found)


def test_of_two_parts_that_are_called_the_same_both_count():
    both = identify({"rate": 1}, {"rate": 2})
    assert sorted(both.values()) == [1, 2]
    assert identify({"rate": 2}, {"rate": 2}) != both
    assert identify({"rate": 1, "rate'": 2}) != both


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b.c": 1}}),
        ({"a\\": {"b": 1}}, {"a\\.b": 1}),
        ({"a": {"": 1}}, {"a": 1}),
        ({"": {"a": 1}}, {"a": 1}),
        ({"a": {}}, {}),
        (Config(), {"rate": 0.1, "sizes": (1, 2), "name": "one"}),
        (Config(), Alike()),
        (Empty(), Alone()),
        ({"a": Empty()}, {}),
    ],
)
def test_what_becomes_parts_is_told_apart(one, another):
    assert identify(one) != identify(another)
    assert identify(part=one) != identify(part=another)
    assert digest(one) != digest(another)


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
    model(torch.ones(1, 3, dtype=torch.long))
    assert identify(model=model) == before, "after use"
    assert identify(model=load_model(model_folder)) == before, "wherever it was read from"
    model.save_pretrained(tmp_path / "elsewhere")
    assert identify(model=load_model(tmp_path / "elsewhere")) == before
    model.config.rms_norm_eps = 0.5
    assert identify(model=model) != before
    model = load_model(model_folder)
    with torch.no_grad():
        next(model.parameters())[0, 0].add_(1)
    assert identify(model=model) != before


class Layer(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        self.register_buffer("mask", torch.zeros(2), persistent=False)
        self.settings, self.act = settings, nn.functional.relu
        for each in self.inner.parameters():
            nn.init.ones_(each)


class Other(Layer):
    def forward(self, x):
        return -x


def hook(*_):
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.eval(),
        lambda layer: layer.inner.eval(),
        lambda layer: layer.mask.add_(1),
        lambda layer: setattr(layer.inner[1], "p", 0.2),
        lambda layer: setattr(layer, "act", nn.functional.gelu),
        lambda layer: setattr(layer, "scorer", Scale(2)),
        lambda layer: layer.settings.update(factor=2),
        lambda layer: layer.inner.append(nn.Identity()),
        lambda layer: layer.inner.append(layer.inner[0]),
        lambda layer: layer.inner.__setitem__(1, nn.Identity()),
        lambda layer: setattr(layer, "__class__", Other),
        lambda layer: layer.inner.register_forward_hook(hook),
        lambda layer: layer.inner[0].weight.data.mul_(2),
    ],
)
def test_a_module_is_known_by_all_that_decides_what_it_computes(change):
    layer = Layer(factor=1)
    before = identify(model=layer)
    assert identify(model=Layer(factor=1)) == before
    change(layer)
    assert identify(model=layer) != before


def deep(levels):
    return [deep(levels - 1)] if levels else 1


def loop(kind):
    around = kind()
    around.append(around) if kind is list else around.update(a=around)
    return around


def test_what_holds_itself_has_an_identity():
    for kind in (list, dict):
        assert identify(part=loop(kind)) == identify(part=loop(kind)) != identify(part=[loop(kind)])
        assert digest(loop(kind)) == digest(loop(kind))
    scale = Scale(1)
    scale.factor = scale.times
    assert digest(scale) != digest(Scale(1))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(2, device="meta"), "a meta tensor holds no values: load it to a device first"),
        (nn.Linear(2, 2, device="meta"), "a meta tensor holds no values"),
        ([pl.Series([object()], dtype=pl.Object)], "a list cannot be read"),
        (deep(900), "a list is nested too deeply: give what it holds"),
        (threading.Lock(), "contents of a lock are unknown"),
        (Path("a\0b"), "missing"),
        (Path("\ud800"), "missing"),
    ],
    ids=["meta", "meta module", "objects", "deep", "lock", "zero", "surrogate"],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(value, reason):
    for give in (lambda: identify(part=value), lambda: identify(value), lambda: digest(value)):
        with pytest.raises(InputError, match=reason) as raised:
            give()
        assert "\n" not in str(raised.value)


def test_names_of_any_characters_are_told_and_kept(capsys, tmp_path):
    there, here = identify(**{"\ud800\n": 1}), identify(**{"\ud800\n": "\ud800"})
    tell(tmp_path / "\ud800", there, here)
    assert capsys.readouterr().err.count("\n") == 1
    write_json(tmp_path / "kept.json", here)
    assert read_json(tmp_path / "kept.json") == here


ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from tests.test_identity import MAKERS, Layer
from trimtab.identity import behaviour, digest
print([digest(make(2), strict=False) for make in MAKERS], digest(Layer(a={"x", "y"})), behaviour(MAKERS[0]))
"""


def test_identities_are_the_same_in_every_process():
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env=here | {"PYTHONHASHSEED": seed}, capture_output=True, encoding="utf-8",
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] != ""
