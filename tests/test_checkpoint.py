"""Files are whole or absent, also when the writer is killed."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest
import torch

from trimtab.checkpoint import (
    Checkpoint,
    atomic,
    file_sha256,
    fingerprint,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from trimtab.errors import InputError


def test_a_failed_write_keeps_the_old_file_and_leaves_no_trace(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic(target) as partial:
        partial.write_text(str(1 / 0), encoding="utf-8")
    assert read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"a": 1})
    code = (
        "import os, signal, sys; from pathlib import Path; from trimtab.checkpoint import atomic\n"
        "with atomic(Path(sys.argv[1])) as p:\n    p.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == -signal.SIGKILL
    assert read_json(target) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2
    write_json(target, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert read_json(target) == {"a": 2}


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "out"
    for content in ("one", "two"):
        with atomic(target) as partial:
            partial.mkdir()
            (partial / content).write_text(content, encoding="utf-8")
    assert {p.name for p in target.iterdir()} == {"two", ".trimtab"}


def test_digests_agree_with_hashlib_and_ignore_key_order(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(os.urandom(3_000_000))
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_checkpoints_return_their_own_state_and_not_that_of_another_identity(tmp_path):
    path = tmp_path / "c.safetensors"
    state = {"w": torch.randn(3, 4)}
    Checkpoint(path, {"lr": 1}).save(state, {"step": 7})
    tensors, record = Checkpoint(path, {"lr": 1}).load()
    assert torch.equal(tensors["w"], state["w"])
    assert record == {"step": 7}
    assert Checkpoint(path, {"lr": 2}).load() is None
    assert Checkpoint(None, {"lr": 1}).load() is None


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"threads": 2}, {"threads": 1}, "(threads 2 there, 1 here)"),
        ({"text": torch.zeros(4)}, {"text": torch.ones(4)}, "(text)"),
        ({"config": {"lr": 0.1, "steps": 5}}, {"config": {"lr": 0.2, "steps": 5}}, "(config.lr 0.1 there, 0.2 here)"),
        ({"prompts": [[1, 2]] * 40}, {"prompts": [[1, 3]] * 40}, "(prompts)"),
    ],
)
def test_progress_of_another_identity_is_told_of_kept_and_found_again(tmp_path, capfd, there, here, told):
    path = tmp_path / "run.safetensors"
    one, other = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    Checkpoint(path, there).save(one, {"step": 1})
    assert Checkpoint(path, here).load() is None
    assert [line for line in capfd.readouterr().err.splitlines() if told in line and str(path) in line]
    Checkpoint(path, here).save(other, {"step": 2})
    for identity, wanted, step in ((there, one, 1), (here, other, 2), (there, one, 1)):
        tensors, record = Checkpoint(path, identity).load()
        assert torch.equal(tensors["w"], wanted["w"])
        assert record == {"step": step}
    Checkpoint(path, here).drop()
    assert Checkpoint(path, here).load() is None
    assert Checkpoint(path, there).load() is not None, "another's progress went with it"
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_over_anothers_progress_keeps_it(tmp_path):
    path = tmp_path / "run.safetensors"
    Checkpoint(path, "one").save({}, {"step": 1})
    Checkpoint(path, "other").save({}, {"step": 2})
    assert Checkpoint(path, "one").load() == ({}, {"step": 1})


def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.zeros(2)})
    before = path.read_bytes()
    for use in (lambda made: made.load(), lambda made: made.save({}, {}), lambda made: made.drop()):
        with pytest.raises(InputError, match=r"model\.safetensors is not a checkpoint of Trimtab's: name another file"):
            use(Checkpoint(path, "one"))
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="is a folder: name a file"):
        Checkpoint(tmp_path, "one").load()


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.safetensors"
    Checkpoint(path, "one").save({"w": torch.randn(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:-50])
    for identity in ("one", "other"):
        with pytest.raises(InputError, match=r"run\.safetensors is damaged"):
            Checkpoint(path, identity).load()


def test_damage_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"w": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"c\.safetensors is damaged"):
        load_tensors(path)
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.json is not readable JSON"):
        read_json(tmp_path / "broken.json")
    with pytest.raises(InputError, match="missing"):
        read_json(tmp_path / "absent.json")
