"""Scales compose through DVC's Hydra support, and a copy of the project is its own repository."""

import shutil
import subprocess

import pytest
import yaml

from trimtab.errors import InputError
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


def test_a_copy_holds_the_working_tree_and_nothing_produced(root, tmp_path):
    copy_project(root, tmp_path / "copy", "smoke")
    copy_project(root, tmp_path / "copy", "smoke")  # a second time replaces the first
    listed = subprocess.run(
        ["git", "ls-files"], cwd=tmp_path / "copy", capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert {"dvc.yaml", "lib/trimtab/corpus.py", "notebooks/corpus.ipynb"} <= set(listed.split())
    assert "dvc.lock" not in listed.split()
    assert not (tmp_path / "copy/.venv").exists()
    assert yaml.safe_load((tmp_path / "copy/params.yaml").read_text(encoding="utf-8"))["base"]["scale"] == "smoke"
