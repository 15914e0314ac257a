"""Nothing is lost that Trimtab did not make: every writer, into every kind of place that somebody may name."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab import files
from trimtab.errors import InputError
from trimtab.files import atomic, exclusive, publish, tree_sha256, write_json
from trimtab.marks import MARK, foreign_files


def save(folder: Path, kind: str = "files", **contents: str) -> None:
    with atomic(folder, kind) as partial:
        partial.mkdir(parents=True)
        for name, text in contents.items():
            path = partial / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_a_folder_keeps_what_others_put_there(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "notes/deep").mkdir()
    (tmp_path / "notes/deep/mine.txt").write_text("mine too", encoding="utf-8")
    save(tmp_path / "notes", a="1", deep__b="2")
    assert contents(tmp_path / "notes") == {"mine.txt": "mine", "deep/mine.txt": "mine too", "a": "1", "deep/b": "2"}
    save(tmp_path / "notes", c="3")
    assert contents(tmp_path / "notes") == {"mine.txt": "mine", "deep/mine.txt": "mine too", "c": "3"}
    assert foreign_files(tmp_path / "notes") == ["deep/mine.txt", "mine.txt"]


@pytest.mark.parametrize("name", ["a", "deep__b"])
def test_a_file_of_the_same_name_that_others_wrote_is_refused_before_anything_is_touched(tmp_path, name):
    path = tmp_path / "out" / name.replace("__", "/")
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="exists and was not written by Trimtab"):
        save(tmp_path / "out", a="1", deep__b="2", other="3")
    assert contents(tmp_path) == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_files_and_folders_do_not_take_each_others_place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="folder is a folder: name a file"):
        write_json(tmp_path / "folder", 1)
    with pytest.raises(InputError, match="file is a file: name a folder"):
        save(tmp_path / "file", a="1")
    with pytest.raises(InputError, match=r"cannot be written, .*file is no folder"):
        write_json(tmp_path / "file/below.json", 1)
    (tmp_path / "folder/a").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="folder/a is a file or a link where a folder is to be"):
        save(tmp_path / "folder", a__b="1")
    (tmp_path / "folder/c").mkdir()
    with pytest.raises(InputError, match="folder/c exists and was not written by Trimtab"):
        save(tmp_path / "folder", c="1")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        write_json(tmp_path / "pipe", 1)
    assert contents(tmp_path) == {"folder/mine": "mine", "folder/a": "mine", "file": "mine"}


def test_the_folder_one_stands_in_is_a_place_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path("new/.."), tmp_path):
        (tmp_path / "new").mkdir(exist_ok=True)
        save(path, a="1")
    assert contents(tmp_path) == {"mine": "mine", "a": "1"}


def test_a_linked_folder_is_written_through_and_a_linked_file_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/mine").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", a="1")
    assert contents(tmp_path / "real") == {"mine": "mine", "a": "1"}
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "cache.json").write_text("of the cache", encoding="utf-8")
    (tmp_path / "out.json").symlink_to("cache.json")
    write_json(tmp_path / "out.json", 1)
    assert (tmp_path / "cache.json").read_text(encoding="utf-8") == "of the cache"


@pytest.mark.parametrize("name", ["n" * 256, "\u00fc" * 128, "n" * 300 + "/below", "a\0b", "\ud800", "d/" * 2000])
def test_a_path_that_no_file_can_have_is_refused_in_one_sentence(tmp_path, name):
    for write in (
        lambda path: write_json(path, 1),
        lambda path: save(path, a="1"),
        lambda path: publish(tmp_path, path),
    ):
        with pytest.raises(InputError, match=r"is no path: it holds|\.\.\. is too long: ") as refusal:
            write(tmp_path / name)
        str(refusal.value).encode()
    assert not list(tmp_path.iterdir())


WRITE = """
import os, signal, sys
from pathlib import Path
from trimtab.files import atomic
with atomic(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_and_what_another_host_writes_is_not(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    monkeypatch.setattr(files, "_host", lambda: "another-host")
    save(tmp_path / "out", b="1")
    assert left.exists(), "the write of a living process on another host was deleted"
    monkeypatch.undo()
    save(tmp_path / "out", b="2")
    assert not left.exists()
    assert contents(tmp_path / "out") == {"b": "2"}


def test_two_writers_of_one_process_do_not_meet(tmp_path):
    with atomic(tmp_path / "x") as one, atomic(tmp_path / "x") as other:
        assert one != other
        one.write_text("one", encoding="utf-8")
        other.write_text("other", encoding="utf-8")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "one"


def test_long_names_and_odd_ones(tmp_path):
    for name in ("n" * 250, "ü" * 120, "[a]*?", "a b", "-rf"):
        write_json(tmp_path / name, 1)
        save(tmp_path / f"{name[:100]}.d", a="1")
    assert len(list(tmp_path.iterdir())) == 10


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    code = (
        "import os, sys; from pathlib import Path; import torch; from trimtab.checkpoint import save_tensors\n"
        "from trimtab.files import atomic, write_json\n"
        f"os.umask({umask}); root = Path(sys.argv[1])\n"
        "save_tensors(root / 't.safetensors', {'w': torch.ones(2)}); write_json(root / 'j.json', 1)\n"
        "with atomic(root / 'folder') as partial:\n"
        "    partial.mkdir(mode=0o700); (partial / 'a').touch(mode=0o600)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop("folder") == 0o777 & ~umask
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_publish_copies_by_links_and_leaves_the_source(tmp_path, monkeypatch):
    save(tmp_path / "work", a="1", deep__b="2")
    publish(tmp_path / "work", tmp_path / "data/out")
    assert contents(tmp_path / "data/out") == contents(tmp_path / "work") == {"a": "1", "deep/b": "2"}
    assert (tmp_path / "data/out/a").samefile(tmp_path / "work/a")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    publish(tmp_path / "work", tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == {"a": "1", "deep/b": "2"}


def test_a_tree_is_known_by_names_and_contents_alone(tmp_path):
    save(tmp_path / "one", a="1", deep__b="2")
    first = tree_sha256(tmp_path / "one")
    os.utime(tmp_path / "one/a", (1, 1))
    (tmp_path / "one" / MARK).unlink()
    assert tree_sha256(tmp_path / "one") == first
    (tmp_path / "one/a").rename(tmp_path / "one/c")
    assert tree_sha256(tmp_path / "one") != first
    with pytest.raises(InputError, match="missing"):
        tree_sha256(tmp_path / "none")


def test_json_is_strict_and_reads_back(tmp_path):
    for value in (float("nan"), {"a": [float("inf")]}):
        with pytest.raises(InputError, match=r"x\.json was not written, NaN and infinity are no JSON"):
            write_json(tmp_path / "x.json", value)
    write_json(tmp_path / "x.json", {"lone": "\ud800", "ü": 1})
    assert files.read_json(tmp_path / "x.json") == {"lone": "\ud800", "ü": 1}
    write_json(tmp_path / "own.json", [float("inf")], strict=False)
    assert files.read_json(tmp_path / "own.json") == [float("inf")]
    (tmp_path / "x.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match="not readable JSON"):
        files.read_json(tmp_path / "x.json")


def test_of_two_who_want_one_path_the_second_is_told(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from trimtab.files import exclusive\n"
        "with exclusive([Path('records/a.ipynb')], Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with exclusive([Path("records/b.ipynb")], tmp_path):
            pass
        with (
            pytest.raises(InputError, match=r"records/a\.ipynb is being written by another run"),
            exclusive([Path("records/b.ipynb"), Path("records/a.ipynb")], tmp_path),
        ):
            raise AssertionError("held twice")
        other.kill()
    with exclusive([Path("records/a.ipynb"), Path("records/b.ipynb")], tmp_path):
        pass


def writers(tiny_llama, model_folder, tmp_path):
    """Every public writer of a folder, by name."""
    from trimtab.interventions import wrap  # noqa: F401 (what a user has at hand)
    from trimtab.rebased.model import LanguageModel, ModelConfig
    from trimtab.sae import SAE
    from trimtab.sae.exchange import export_saelens
    from trimtab.steering.folding import fold
    from trimtab.steering.vectors import SteeringVectors

    sae = SAE(16, 32, 4)
    vectors = SteeringVectors([1], 16)
    language_model = LanguageModel(ModelConfig(32, 16, ("conv", "softmax"), 1, 4, 8, positions=16))
    return {
        "SAE.save_pretrained": (sae.save_pretrained, "config.json"),
        "export_saelens": (lambda folder: export_saelens(sae, folder, model_name="m", hook_name="h"), "cfg.json"),
        "fold": (lambda folder: fold(vectors, model_folder, folder), "config.json"),
        "LanguageModel.save": (language_model.save, "config.json"),
    }


@pytest.mark.parametrize("name", ["SAE.save_pretrained", "export_saelens", "fold", "LanguageModel.save"])
def test_every_writer_of_a_folder_keeps_the_files_of_others(tiny_llama, model_folder, tmp_path, name, monkeypatch):
    write, clash = writers(tiny_llama, model_folder, tmp_path)[name]
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git/HEAD").write_text("ref", encoding="utf-8")
    (project / "notes.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(project)
    for _ in range(2):
        write(Path())
        assert (project / "notes.txt").read_text(encoding="utf-8") == "mine"
        assert (project / ".git/HEAD").read_text(encoding="utf-8") == "ref"
        assert (project / clash).is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / clash).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="was not written by Trimtab"):
        write(other)
    assert contents(other) == {clash: "mine"}
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is a file: name a folder"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    for impossible in ("n" * 300, "a\0b", "\ud800"):
        with pytest.raises(InputError, match=r"is no path: it holds|is too long"):
            write(tmp_path / impossible)


def test_vectors_are_not_written_over_a_folder_or_what_others_wrote(model_folder, tmp_path):
    from trimtab.steering.export import export_gguf, save_vectors
    from trimtab.steering.vectors import SteeringVectors

    vectors = SteeringVectors([1], 16)
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports/mine").write_text("mine", encoding="utf-8")
    with torch.no_grad():
        next(vectors.parameters()).fill_(1.0)
    for write in (
        lambda path: save_vectors(path, vectors, model_folder),
        lambda path: export_gguf(vectors, model_folder, path),
    ):
        with pytest.raises(InputError, match="exports is a folder: name a file"):
            write(tmp_path / "exports")
        (tmp_path / "notes").write_text("mine", encoding="utf-8")
        with pytest.raises(InputError, match="notes exists and was not written by Trimtab"):
            write(tmp_path / "notes")
        assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"
        for _ in range(2):
            write(tmp_path / "own")
        (tmp_path / "own").unlink()
    assert contents(tmp_path / "exports") == {"mine": "mine"}


def test_a_capture_begins_only_where_no_other_lies(caches, tiny_llama, tokenizer, blocks_file, cache_config, tmp_path):
    from trimtab.activations.writing import write_cache
    from trimtab.corpus import Blocks
    from trimtab.interventions import wrap

    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "more").mkdir()
    options = {"identity": {"model": "tiny"}, "bos": 0, "pad": 1}
    write_cache(folder, wrap(tiny_llama, tokenizer), Blocks(blocks_file, "val", 500), cache_config, **options)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (folder / "more").is_dir()
    for name in ("shard-00000.safetensors", "means.safetensors"):
        (tmp_path / name[:5]).mkdir()
        (tmp_path / name[:5] / name).write_text("mine", encoding="utf-8")
        with pytest.raises(InputError, match="is of no capture that goes on here"):
            write_cache(
                tmp_path / name[:5],
                wrap(tiny_llama, tokenizer),
                Blocks(blocks_file, "val", 500),
                cache_config,
                **options,
            )
        assert (tmp_path / name[:5] / name).read_text(encoding="utf-8") == "mine"
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "another").mkdir()
    for place, name in (
        (folder, "journal.json"),
        (tmp_path / "another", "journal.json"),
        (tmp_path / "another", "manifest.json"),
    ):
        (place / name).write_text('["mine"]', encoding="utf-8")
        with pytest.raises(InputError, match=f"{name} is of no capture"):
            write_cache(place, wrap(tiny_llama, tokenizer), Blocks(blocks_file, "val", 500), cache_config, **options)
        assert (place / name).read_text(encoding="utf-8") == '["mine"]'
    for place in (tmp_path / "file", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"is a file: name a folder|is too long"):
            write_cache(place, wrap(tiny_llama, tokenizer), Blocks(blocks_file, "val", 500), cache_config, **options)
