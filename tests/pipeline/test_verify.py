"""Records are believed only while record, results, parameters, library, outputs and cache all agree."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.pages import Reader
from trimtab.errors import InputError
from trimtab.pipeline.conditions import conditions
from trimtab.pipeline.overview import table
from trimtab.pipeline.rehash import _damaged

from .recorded import PARAMETERS, WORK, ask, change, commit_all, set_parameters
from .test_records import ALTERED, BROKEN
from .toy import STAGE, make, succeed


@pytest.fixture
def project(copied) -> Path:
    """A copy to do harm to."""
    return copied


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("notebook", "notebooks/other.ipynb", "the notebook of the record: 'notebooks/other.ipynb', of its stage: "),
        ("sections", ["toy", "base"], "the sections of the record: ['toy', 'base'], of its stage: ['toy']"),
        ("outputs", {}, "the outputs of the record: {}, of its stage: {'out': 'data/toy', "),
        ("record", "other", "records/toy.ipynb is the record of other"),
        (
            "results",
            {"metrics": {}, "claims": []},
            "data/results/toy.json is not what the record says that its run found",
        ),
        (
            "library",
            {"lib/trimtab/launch.py": "0"},
            "lib/trimtab/launch.py has changed behaviour since: `dvc repro --force",
        ),
    ],
)
def test_a_record_that_disagrees_with_its_stage_is_named_even_with_its_digest_mended(project, key, value, reason):
    change(project, lambda record: record["metadata"]["trimtab"].update({key: value}), sign=True)
    commit_all(project)
    (found,) = conditions(project)
    assert found.state == ("stale" if key == "library" else "altered")
    assert reason in "; ".join(found.reasons)


@pytest.mark.parametrize("name", ["cells", "metrics", "provenance gone"])
def test_an_altered_record_is_named_even_where_dvc_was_told_to_take_it(project, name):
    change(project, ALTERED[name])
    commit_all(project)
    (found,) = conditions(project)
    assert found.state == "altered"
    assert found.reasons == ("records/toy.ipynb is not what its run wrote: its digest does not fit",)
    assert "has been altered since its run" in ask("show", "toy")[1]


@pytest.mark.parametrize("name", ["empty", "list", "text", "null", "no status", "claims"])
def test_a_record_altered_beyond_reading_is_named_by_list_and_verify(project, name):
    change(project, BROKEN[name])
    code, shown = ask("verify")
    assert code == 1
    assert "toy: altered: " in shown
    assert "records/toy.ipynb" in shown
    assert "altered" in ask("list")[1]
    for command in (("show", "toy"), ("diff", "toy")):
        with pytest.raises(InputError, match=r"records/toy\.ipynb"):
            ask(*command)


def test_edited_results_are_named_even_where_dvc_was_told_to_take_them(project):
    path = project / "data/results/toy.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"held"', '"not held"'), encoding="utf-8")
    commit_all(project)
    (found,) = conditions(project)
    assert found.state == "altered"
    assert found.reasons == ("data/results/toy.json is not what the record says that its run found",)
    path.write_text("[", encoding="utf-8")
    commit_all(project)
    (found,) = conditions(project)
    assert "not readable JSON" in found.reasons[0]


def test_two_records_swapped_are_named_even_where_dvc_was_told_to_take_them(tmp_path):
    folder = tmp_path / "pair"
    make(folder, PARAMETERS + '\narm: str = "a"', WORK)
    stage = json.loads(
        json.dumps(STAGE).replace("toy.json", "${item.arm}.json").replace("data/toy", "data/${item.arm}")
    )
    stage = json.loads(json.dumps(stage).replace("records/toy.", "records/sae/${item.arm}."))
    stage["cmd"] += " --set arm=${item.arm} --record records/sae/${item.arm}.ipynb"
    stage = {"matrix": {"arm": ["a", "b"]}, **stage}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sae": stage}}), encoding="utf-8")
    set_parameters(folder, lr=0.5)
    succeed(folder, "dvc", "repro", "--quiet")
    assert [(each.stage, each.state) for each in conditions(folder)] == [("sae@a", "fresh"), ("sae@b", "fresh")]
    one, other = (folder / f"records/sae/{arm}.ipynb" for arm in "ab")
    contents = one.read_bytes(), other.read_bytes()
    for path, content in zip((other, one), contents, strict=True):
        path.unlink()
        path.write_bytes(content)
    for _ in range(2):  # before, and after
        found = conditions(folder)
        assert [each.state for each in found] == ["altered", "altered"]
        assert [each.reasons[0] for each in found] == [
            "records/sae/a.ipynb is the record of sae/b", "records/sae/b.ipynb is the record of sae/a"
        ]  # fmt: skip
        commit_all(folder)


def test_changed_behaviour_of_the_library_is_named_with_the_command_that_helps(project, monkeypatch):
    now = {"lib/trimtab/launch.py": "1", "lib/trimtab/files.py": "2"}
    monkeypatch.setattr("trimtab.pipeline.conditions.module_digests", lambda *_: now)
    (found,) = conditions(project)
    assert (found.state, found.command) == ("stale", "dvc repro --force toy")
    told = "lib/trimtab/files.py, lib/trimtab/launch.py have changed behaviour since: `dvc repro --force toy`"
    assert found.reasons == (told,)
    assert "dvc repro --force toy" in Reader(table(project, [found])).text


def test_an_early_record_cannot_say_what_the_library_was(project):
    def edit(record):
        about = record["metadata"]["trimtab"]
        about["format"] = 1
        for key in ("record", "sections", "outputs", "library", "digest"):
            del about[key]

    change(project, edit)
    commit_all(project)
    (found,) = conditions(project)
    assert found.state == "stale"
    assert "early one" in found.reasons[0]
    assert ask("show", "toy")[0] == 0


def test_after_a_checkout_of_another_commit_the_remedy_is_dvc_checkout(project):
    succeed(project, "git", "checkout", "--quiet", "HEAD~1")
    (found,) = conditions(project)
    assert (found.state, found.command) == ("of another commit", "dvc checkout")
    code, shown = ask("verify")
    assert code == 1
    assert "toy: of another commit: " in shown
    assert "`dvc checkout`" in shown
    assert "dvc checkout" in Reader(table(project, [found])).text
    succeed(project, "dvc", "checkout", "--quiet")
    assert ask("verify") == (0, "1 of 1 stages are fresh.\n")


def test_what_a_run_made_is_known_by_its_record_where_the_cache_is_lost(project):
    shutil.rmtree(project / ".dvc/cache")
    succeed(project, "git", "checkout", "--quiet", "HEAD~1")
    (found,) = conditions(project)
    assert found.state == "of another commit", found.reasons
    (project / "data/toy").unlink()
    (project / "data/toy").write_text("0.9", encoding="utf-8")
    (found,) = conditions(project)
    assert (found.state, found.reasons) == ("altered", ("data/toy is not what its run wrote",))


def test_a_log_that_no_run_wrote_is_named_though_no_record_has_its_digest(project):
    log = project / "records/toy.log"
    written = log.read_bytes()
    log.unlink()
    log.write_bytes(written + b"12:00:00 all is well\n")
    (found,) = conditions(project)
    assert (found.state, found.reasons) == ("altered", ("records/toy.log is not what its run wrote",))


def flip(path: Path) -> None:
    """One bit, in place, with the file's times and size as they were."""
    status, mode = path.stat(), path.stat().st_mode
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_bit_flipped_in_the_cache_is_named_by_the_deep_look(project):
    assert ask("verify", "--deep") == (0, "1 of 1 stages are fresh.\n")
    digest = hashlib.md5((project / "data/toy").read_bytes()).hexdigest()
    kept = project / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"
    flip(kept)
    (project / "data/toy").unlink()
    succeed(project, "dvc", "checkout", "--quiet")
    code, shown = ask("verify", "--deep")
    assert code == 1
    assert "data/toy is not what its run wrote" in shown
    assert f"DVC's cache is damaged at {kept}" in shown
    assert "data/toy is not what its record says that its run wrote" in shown


def test_a_bit_flipped_in_the_working_tree_is_named_by_the_deep_look(project):
    path = project / "data/toy"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert ask("verify")[0] == 0  # DVC has seen the file now
    flip(path)
    code, shown = ask("verify", "--deep")
    assert code == 1
    assert "data/toy is not what its run wrote" in shown


def test_folders_are_read_file_by_file_with_and_without_their_list(tmp_path):
    folder, cache = tmp_path / "out", tmp_path / "cache"
    (folder / "deep").mkdir(parents=True)
    cache.mkdir()
    for name in ("b", "deep/a"):
        (folder / name).write_text(name, encoding="utf-8")
    entries = [{"md5": hashlib.md5(name.encode()).hexdigest(), "relpath": name} for name in ("b", "deep/a")]
    listed = json.dumps(entries).encode()
    digest = f"{hashlib.md5(listed).hexdigest()}.dir"

    def damaged():
        files = [path for path in folder.rglob("*") if path.is_file()]
        return list(_damaged(folder, digest, lambda oid: cache / oid, lambda _: files))

    for write in (False, True):
        if write:
            (cache / digest).write_bytes(listed)
        assert damaged() == []
        flip(folder / "deep/a")
        assert damaged() == (["deep/a"] if write else ["."])
        flip(folder / "deep/a")
    (folder / "c").write_text("c", encoding="utf-8")
    assert damaged() == ["c"]
    flip(cache / digest)
    assert damaged()[0].startswith("DVC's cache is damaged")
