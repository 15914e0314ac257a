"""Scales compose through DVC's Hydra support, and a copy of the project is its own repository."""

import os
import shutil
import subprocess

import pytest
import yaml

from trimtab.errors import InputError
from trimtab.pipeline.report import MARKS
from trimtab.pipeline.scales import compose, copy_project


def test_a_scale_and_overrides_change_what_they_say(root, tmp_path):
    compose(root, tmp_path / "a.yaml", "laptop")
    compose(root, tmp_path / "b.yaml", "laptop", ["sae.steps=7", "base.threads=1"])
    one, other = (yaml.safe_load((tmp_path / name).read_text(encoding="utf-8")) for name in ("a.yaml", "b.yaml"))
    assert (other["sae"].pop("steps"), other["base"].pop("threads")) == (7, 1)
    assert other["sae_random"].pop("steps") == 7, "the control is trained as the SAEs are"
    assert other["mqar"].pop("workers") == 1, "as many as threads"
    del one["sae"]["steps"], one["sae_random"]["steps"], one["base"]["threads"], one["mqar"]["workers"]
    assert one == other


def test_unknown_scales_and_keys_are_named(root, tmp_path):
    with pytest.raises(InputError, match="'huge' is not a scale: choose one of gpu, laptop, paper, smoke"):
        compose(root, tmp_path / "p.yaml", "huge")
    for override, message in (
        (
            "sae.stepz=7",
            r"^conf/ does not compose with 'sae\.stepz=7': there is no `sae\.stepz`; did you mean `sae\.steps`\?$",
        ),
        ("sae=3", "^conf/ does not compose with 'sae=3': .*`sae` is not a container"),
        ("sae.steps=[", "^conf/ does not compose with"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            compose(root, tmp_path / "p.yaml", "laptop", [override])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_copying_never_deletes_what_is_no_copy(root, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x", encoding="utf-8")
    for target in (tmp_path / "precious", root, root.parent):
        with pytest.raises(InputError, match="is no earlier copy"):
            copy_project(root, target, "smoke")
    assert (tmp_path / "precious/file").exists()
    with pytest.raises(InputError, match="is not a scale"):
        copy_project(root, tmp_path / "new", "huge")
    assert not (tmp_path / "new").exists()
    shutil.copytree(root / "conf", tmp_path / "bare/conf")
    with pytest.raises(InputError, match="is not a git repository"):
        copy_project(tmp_path / "bare", tmp_path / "new", "smoke")


@pytest.mark.parametrize(
    "held",
    [
        "# my notes\n",
        "~\n",
        "base: 3\n",
        "base:\n  scale: laptop\n",
        "[]\n",
        "base:\n  *x\n",
        "conf/config.yaml",
        "\0",
        "[" * 5000,
    ],
)
def test_only_what_was_composed_is_composed_anew(root, tmp_path, held):
    output = tmp_path / "params.yaml"
    output.write_text((root / held).read_text(encoding="utf-8") if "conf" in held else held, encoding="utf-8")
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"params\.yaml exists and was not written by Trimtab: name a new file"):
        compose(root, output)
    assert output.read_bytes() == before


def test_what_trimtab_or_dvc_composed_is_composed_anew(root, tmp_path):
    from dvc.utils.hydra import compose_and_dump

    output, tracked = tmp_path / "params.yaml", tmp_path / "tracked.yaml"
    compose_and_dump(output, str(root / "conf"), None, "config", str(root), ["scale=gpu", "sae.steps=2000"])
    shutil.copyfile(root / "params.yaml", tracked)
    for path in (output, tracked, output):
        compose(root, path, "smoke")
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["base"]["scale"] == "smoke"


@pytest.fixture
def small(tmp_path):
    """A repository of three files and a configuration."""
    project = tmp_path / "small"
    readme = f"# Small\n{MARKS[0]}\nclaims of the laptop\n{MARKS[1]}\nThe end.\n"
    texts = {"README.md": readme, "lib/code.py": "x = 1\n", ".gitignore": "data\n*.log\n", "old.txt": "old\n"}
    texts |= {
        "conf/config.yaml": "defaults: [scale: smoke, _self_]\nbase: {seed: 0}\n",
        "conf/scale/smoke.yaml": "{}\n",
    }
    for name, text in texts.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    return project


def tree(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


def test_an_earlier_copy_is_brought_up_to_date_and_keeps_what_others_put_there(small, tmp_path):
    copy = tmp_path / "copy"
    copy_project(small, copy, "smoke")
    kept = {"data/out/mine": "ignored", "data/out/result": "of a stage", "my.log": "ignored", "mine/notes.txt": "mine"}
    for name, text in kept.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    (copy / "mine/empty").mkdir()
    readme = (copy / "README.md").read_text(encoding="utf-8")
    (copy / "README.md").write_text(readme.replace("of the laptop", "of the smoke scale"), encoding="utf-8")
    (small / "lib/code.py").write_text("x = 2\n", encoding="utf-8")
    (small / "README.md").write_text(readme.replace("The end", "To be continued"), encoding="utf-8")
    (small / "old.txt").unlink()
    copy_project(small, copy, "smoke")
    held = {name: text.decode() for name, text in tree(copy).items()}
    assert kept.items() <= held.items()
    assert (copy / "mine/empty").is_dir()
    assert held["lib/code.py"] == "x = 2\n"
    assert "To be continued" in held["README.md"]
    assert "old.txt" not in held
    assert git(copy, "status", "--porcelain") == "?? mine/"
    assert git(copy, "rev-list", "--count", "HEAD") == "2"


@pytest.mark.parametrize("name", ["README.md", "lib/code.py", "params.yaml", "old.txt", "new.txt", "lib"])
def test_a_copy_in_which_a_source_was_changed_is_refused_before_anything_is_touched(small, tmp_path, name):
    copy = tmp_path / "copy"
    copy_project(small, copy, "smoke")
    if name == "lib":
        (copy / "lib").rename(tmp_path / "elsewhere")
        (copy / "lib").symlink_to(tmp_path / "elsewhere")
    else:
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write("mine\n")
    (small / "old.txt").unlink()
    for new in ("new.txt", "lib/code.py"):
        (small / new).write_text("new\n", encoding="utf-8")
    before = tree(copy), git(copy, "rev-parse", "HEAD")
    for commit in (False, True):
        if commit:
            git(copy, "add", "--all")
            git(copy, "-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "-m", "mine")
            before = tree(copy), git(copy, "rev-parse", "HEAD")
        with pytest.raises(InputError, match=f"copy/{name} (has been changed|exists and was not|is a file or a link)"):
            copy_project(small, copy, "smoke")
        assert (tree(copy), git(copy, "rev-parse", "HEAD")) == before


def test_odd_names_are_copied_and_impossible_places_refused(small, tmp_path):
    for name in (b":(top)x", b"*", b"\xff.txt", b"a\nb"):
        (small / os.fsdecode(name)).write_text("odd", encoding="utf-8")
    for _ in range(2):
        copy_project(small, tmp_path / "copy", "smoke")
    assert {path.name for path in small.iterdir()} <= {path.name for path in (tmp_path / "copy").iterdir()}
    assert git(tmp_path / "copy", "status", "--porcelain") == ""
    for name in ("a\0b", "\ud800", "n" * 300):
        with pytest.raises(InputError, match=r"is no path|is too long"):
            copy_project(small, tmp_path / name, "smoke")


def test_a_copy_holds_the_working_tree_and_nothing_produced(root, tmp_path):
    copy_project(root, tmp_path / "copy", "smoke")
    copy_project(root, tmp_path / "copy", "smoke")  # a second time brings it up to date
    listed = subprocess.run(
        ["git", "ls-files"], cwd=tmp_path / "copy", capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert {"dvc.yaml", "lib/trimtab/corpus.py", "notebooks/corpus.ipynb"} <= set(listed.split())
    assert "dvc.lock" not in listed.split()
    assert not (tmp_path / "copy/.venv").exists()
    assert yaml.safe_load((tmp_path / "copy/params.yaml").read_text(encoding="utf-8"))["base"]["scale"] == "smoke"
