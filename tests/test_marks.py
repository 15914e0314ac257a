"""A folder's mark lists what Trimtab wrote there, and gives no right to anything else."""

import json
import os

import pytest

from tests.test_files import contents, save
from trimtab.errors import InputError
from trimtab.files import atomic, file_sha256, tree_sha256
from trimtab.marks import MARK, foreign_files, own_files


def test_writers_of_two_kinds_share_a_folder(tmp_path):
    save(tmp_path / "out", "sae", a="1", shared="sae")
    save(tmp_path / "out", "export", b="2", shared="export")
    listed = {kind: list(held) for kind, held in own_files(tmp_path / "out").items()}
    assert listed == {"sae": ["a", "shared"], "export": ["b", "shared"]}
    save(tmp_path / "out", "sae", c="3")
    assert contents(tmp_path / "out") == {"b": "2", "c": "3", "shared": "export"}


MARKS = [
    "",
    "my notes",
    "[]",
    "{}\n",
    "{",
    '{"files": ["a"]}',
    '{\n "files": [\n  "../precious"\n ]\n}\n',
    "\udcff",
    None,
]


@pytest.mark.parametrize("mark", MARKS)
def test_something_else_that_bears_the_marks_name_is_refused(tmp_path, mark):
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "out").mkdir()
    if mark is None:
        (tmp_path / "out" / MARK).mkdir()
        (tmp_path / "out" / MARK / "settings").write_text("mine", encoding="utf-8")
    else:
        (tmp_path / "out" / MARK).write_bytes(mark.encode("utf-8", "surrogateescape"))
    (tmp_path / "out/a").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("a", "b"):
        with pytest.raises(InputError, match=r"out/\.trimtab was not written by Trimtab"):
            save(tmp_path / "out", **{name: "1"})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def by_hand(kind, place):
    """Do to a file or folder what a user may do."""
    match kind:
        case "edited":
            place.write_text("mine", encoding="utf-8")
        case "made a folder":
            place.unlink()
            place.mkdir()
        case "made a full folder":
            place.unlink()
            (place / "deep").mkdir(parents=True)
            (place / "deep/mine").write_text("mine", encoding="utf-8")
        case "linked to a folder":
            place.unlink()
            place.symlink_to(place.parent.parent)


@pytest.mark.parametrize("kind", ["edited", "made a folder", "made a full folder", "linked to a folder"])
@pytest.mark.parametrize("name", ["a", "deep/b"])
@pytest.mark.parametrize("again", ["a", "c"])  # the file is written again, or is to be removed
def test_what_was_changed_since_it_was_written_is_refused_before_anything_is_touched(tmp_path, kind, name, again):
    save(tmp_path / "out", a="1", deep__b="2")
    by_hand(kind, tmp_path / "out" / name)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"out/{name} has been changed since Trimtab wrote it: ") as refusal:
        save(tmp_path / "out", **({"a": "3", "deep__b": "4"} if again == "a" else {"c": "3"}))
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before
    assert name in {each.removesuffix("/deep/mine") for each in foreign_files(tmp_path / "out")}


def test_what_is_as_it_was_written_is_replaced_whatever_its_time_and_kind_of_link(tmp_path):
    save(tmp_path / "out", a="1", b="2")
    for name in ("a", "b"):  # as `dvc checkout` does, by the type of the cache
        (tmp_path / "out" / name).rename(tmp_path / name)
    os.link(tmp_path / "a", tmp_path / "out/a")
    (tmp_path / "out/b").symlink_to(tmp_path / "b")
    os.utime(tmp_path / "a", (1, 1))
    save(tmp_path / "out", a="3", b="4")
    assert contents(tmp_path) == {"a": "1", "b": "2", "out/a": "3", "out/b": "4"}


def test_marks_of_earlier_versions_are_read(tmp_path):
    save(tmp_path / "out", a="1", b="2")
    (tmp_path / "out" / MARK).write_text(json.dumps({"files": ["a", "b"]}, indent=1) + "\n", encoding="utf-8")
    assert foreign_files(tmp_path / "out") == []
    save(tmp_path / "out", a="3")
    assert contents(tmp_path / "out") == {"a": "3"}


def test_nothing_is_written_or_removed_behind_a_linked_folder(tmp_path):
    save(tmp_path / "out", a="1", sub__b="2")
    (tmp_path / "out/sub").rename(tmp_path / "elsewhere")
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    for written in ({"sub__new": "3"}, {"sub__b": "3"}, {"a": "3"}):
        with pytest.raises(InputError, match="out/sub is a file or a link where a folder is to be"):
            save(tmp_path / "out", **written)
    assert contents(tmp_path / "elsewhere") == {"b": "2"}
    assert foreign_files(tmp_path / "out") == ["sub"]


def test_a_linked_folder_has_no_digest(tmp_path):
    save(tmp_path / "out", a="1")
    for behind in (tmp_path / "out", tmp_path):
        (tmp_path / "out/sub").symlink_to(behind)
        with pytest.raises(InputError, match="out/sub is a link to a folder: put the folder itself there"):
            tree_sha256(tmp_path / "out")
        (tmp_path / "out/sub").unlink()


def test_empty_folders_are_kept_and_count(tmp_path):
    save(tmp_path / "out", a="1", sub__b="2")
    before = tree_sha256(tmp_path / "out")
    (tmp_path / "out/sub/mine").mkdir()
    (tmp_path / "out/mine").mkdir()
    assert tree_sha256(tmp_path / "out") != before
    save(tmp_path / "out", c="3")
    assert (tmp_path / "out/mine").is_dir()
    assert foreign_files(tmp_path / "out") == ["mine", "sub/mine"]
    for _ in range(2):  # an empty folder may be Trimtab's own
        with atomic(tmp_path / "own") as partial:
            (partial / "nothing").mkdir(parents=True)
    assert foreign_files(tmp_path / "own") == []
    save(tmp_path / "own", a="1")
    assert not (tmp_path / "own/nothing").exists()


def test_marks_are_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, "sae", b="1", a="2")
    assert (tmp_path / "one" / MARK).read_bytes() == (tmp_path / "two" / MARK).read_bytes()
    sums = {name: file_sha256(tmp_path / "one" / name) for name in "ab"}
    assert json.loads((tmp_path / "one" / MARK).read_text(encoding="utf-8")) == {"sae": sums}
