"""Whatever a notebook hands to `finish` becomes JSON that a strict parser reads, or is refused by the metric's name."""

import json
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.claims import Claim, verdict_table
from trimtab.errors import InputError
from trimtab.pipeline.notebook import Stage
from trimtab.pipeline.results import plain


class Colour(Enum):
    RED = 1


@dataclass
class Pair:
    one: int
    two: float


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), 0.1), (np.float64(2.5), 2.5), (np.int64(3), 3), (np.bool_(True), True), (np.str_("a"), "a"),
        (np.arange(3), [0, 1, 2]), (np.ones((1, 2)), [[1.0, 1.0]]), (np.array(4), 4),
        (torch.tensor(1.5), 1.5), (torch.tensor([1, 2]), [1, 2]), (torch.tensor([0.5], dtype=torch.bfloat16), [0.5]),
        (torch.nn.Parameter(torch.ones(1)), [1.0]), (torch.tensor(True), True),
        (Path("a/b"), "a/b"), (pl.Series([1, 2]), [1, 2]), (pl.DataFrame({"a": [1]}), [{"a": 1}]),
        ({1: 2, (3, 4): 5, None: 6}, {"1": 2, "[3, 4]": 5, "None": 6}), ((1, (2,)), [1, [2]]), ({3, 1}, [1, 3]),
        (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25), (Colour.RED, 1), (Pair(1, 0.5), {"one": 1, "two": 0.5}),
        (1 / 3, 0.333333), (10**30, 10**30), ("\ud800", "\\ud800"), ({"\ud800": 1}, {"\\ud800": 1}),
        (np.longdouble(0.5), 0.5),
    ],
)  # fmt: skip
def test_numbers_of_every_library_become_plain_ones(value, expected):
    unbounded: list[str] = []
    found = plain({"m": value}, "metrics", unbounded)
    assert found == {"m": expected}
    assert type(found["m"]) is type(expected)
    assert not unbounded
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "value",
    [float("nan"), np.float32("inf"), torch.tensor(float("-inf")), Decimal("NaN"), Decimal("sNaN"), np.float64("-inf")],
)
def test_what_is_not_finite_is_null_and_named(value):
    unbounded: list[str] = []
    assert plain({"sae": {"fvu": [1.0, value]}}, "metrics", unbounded) == {"sae": {"fvu": [1.0, None]}}
    assert unbounded[0].startswith("metrics.sae.fvu[1] (")


@pytest.mark.parametrize("value", [object(), b"bytes", 1j, lambda: 0, type, np.array([1j]), np.array([object()])])
def test_what_means_nothing_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"metrics\.a\.b.* is \w+, which is no result"):
        plain({"a": {"b": value}}, "metrics", [])


def test_two_keys_of_one_spelling_are_refused():
    with pytest.raises(InputError, match="metrics has two keys that are both written as '1'"):
        plain({1: "a", "1": "b"}, "metrics", [])


def test_a_list_that_holds_itself_is_refused():
    endless: list = []
    endless.append(endless)
    array = np.empty(1, dtype=object)
    array[0] = array
    mapping: dict = {}
    mapping["x"] = mapping
    for each in (endless, (1, endless), array, mapping):
        with pytest.raises(InputError, match=r"metrics.* is nested too deeply, or holds itself"):
            plain({"a": each}, "metrics", [])


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()])
def test_a_tensor_whose_numbers_cannot_be_read_is_refused_by_name(tensor):
    with pytest.raises(InputError, match=r"metrics\.a is Tensor, whose numbers cannot be read"):
        plain({"a": tensor}, "metrics", [])


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=3) | st.dates()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))


@settings(max_examples=300, deadline=None)
@given(values)
def test_anything_is_strict_json_or_refused(value):
    try:
        found = plain({"m": value}, "metrics", [])
    except InputError:
        return
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def stage(tmp_path, monkeypatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    return Stage({}, "cpu", 0)


def test_a_diverged_run_ends_with_results_that_say_so(tmp_path, monkeypatch, capsys):
    claim = Claim("better", "It is better.", "difference", "above", 0.0, "none")
    verdicts = [
        claim.judge(*numbers, "3 seeds") for numbers in ((np.nan,) * 3, (np.inf, 0.0, np.inf), (1.0, np.nan, 2.0))
    ]
    assert {(each.outcome, each.effect) for each in verdicts} == {("inconclusive", None)}
    assert "| none | unbounded |" in verdict_table(verdicts)
    stage(tmp_path, monkeypatch).finish("results.json", {"loss": np.float32("nan"), "steps": np.int64(3)}, verdicts)
    found = json.loads(
        (tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name)
    )
    assert found["metrics"] == {"loss": None, "steps": 3}
    assert "Not finite, and written as null: metrics.loss (nan)." in capsys.readouterr().out


def test_results_do_not_replace_a_file_of_something_else(tmp_path, monkeypatch):
    (tmp_path / "package.json").write_text('{"name": "mine"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"package\.json exists and was not written by Trimtab"):
        stage(tmp_path, monkeypatch).finish("package.json", {"a": 1})
    for _ in range(2):
        stage(tmp_path, monkeypatch).finish("results/a.json", {"a": 1})


def test_by_hand_progress_is_dropped_at_the_end_and_under_the_runner_it_stays(tmp_path, monkeypatch):
    for variable, stays in (("", False), ("listed", True)):
        made = stage(tmp_path, monkeypatch)
        if variable:
            monkeypatch.setenv("TRIMTAB_PROGRESS", str(tmp_path / variable))
        (tmp_path / "work").mkdir(exist_ok=True)
        made.folders.append(tmp_path / "work")
        made.finish("results.json", {})
        assert (tmp_path / "work").exists() == stays
