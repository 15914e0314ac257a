"""A run replaces what a run of the same record made, and nothing else: hostile and careless paths, two runs at once."""

import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from tests.smoke import environment
from trimtab.errors import InputError
from trimtab.marks import MARK
from trimtab.pipeline.places import Places
from trimtab.pipeline.records import read_record
from trimtab.pipeline.run import run_notebook

from .conftest import make_notebook

WRITE = (
    "from pathlib import Path\nfrom trimtab.files import atomic\nwith atomic(Path(out)) as p:\n    p.write_text(name)"
)


FOLDER = (
    "from pathlib import Path\nfrom trimtab.files import atomic\n"
    "with atomic(Path(out)) as p:\n    (p / 'deep').mkdir(parents=True)\n    (p / 'deep/a').write_text(name)"
)
PLAIN = (
    "from pathlib import Path\n(Path(out) / 'deep').mkdir(parents=True)\n"
    "(Path(out) / 'own').mkdir()\n(Path(out) / 'deep/a').write_text(name)"
)


def everything(folder: Path) -> dict[str, bytes | None]:
    """As `tree`, with links and empty folders."""
    found = {path.relative_to(folder).as_posix(): None for path in folder.rglob("*")}
    return {name: None for name in found if not name.startswith("scratch")} | tree(folder)


def tree(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and "scratch" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def guarded(project: Path) -> Path:
    """A project with things in it that a run must not touch."""
    make_notebook(project, WRITE)
    for name in (".git/HEAD", ".dvc/config", "docs/page.md", "README.md", "lib/x.py", "conf/config.yaml", "notes.txt"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("mine", encoding="utf-8")
    (project.parent / "elsewhere/dir").mkdir(parents=True, exist_ok=True)
    (project.parent / "elsewhere/dir/file").write_text("mine", encoding="utf-8")
    (project / "link").symlink_to(project.parent / "elsewhere/dir")
    (project / "up").symlink_to("..")
    nbformat.write(nbformat.v4.new_notebook(), project / "other.ipynb")
    (project / "full.log").write_text("12:34:56 a diary", encoding="utf-8")
    (project / "folder.log").mkdir()
    return project


def attempt(project: Path, *, record: str = "records/toy.ipynb", **outputs: str) -> int:
    return run_notebook(
        Path("toy.ipynb"), Path(record), root=project, sections=["toy"], settings={},
        outputs={name: Path(path) for name, path in outputs.items()},
    )  # fmt: skip


OUTPUTS = [
    "", ".", "./", "..", "../elsewhere/dir", "data/../..", "{root}", "/", "{outside}/dir", "{outside}/new",
    "toy.ipynb", "params.yaml", "dvc.yaml", "dvc.lock", ".git", ".git/x", ".dvc", ".dvc/cache", "docs", "docs/page.md",
    "README.md", "lib", "lib/new", "conf", "link", "link/file", "up", "up/elsewhere", "notes.txt", "notes.txt/below",
    "records", "records/toy.ipynb", "records/toy.log", "records/toy.ipynb/x", "./docs/../docs/",
]  # fmt: skip


@pytest.mark.parametrize("out", OUTPUTS)
def test_an_output_that_would_replace_something_is_refused_before_anything_is_touched(guarded, out):
    path = out.format(root=guarded, outside=guarded.parent / "elsewhere")
    before = tree(guarded.parent)
    with pytest.raises(InputError) as refusal:
        attempt(guarded, out=path)
    assert tree(guarded.parent) == before
    assert "\n" not in str(refusal.value)


RECORDS = [
    "toy.ipynb", "./toy.ipynb", "notebooks/../toy.ipynb", "other.ipynb", "notes.txt", "docs", "", "../x.ipynb",
    "{outside}/x.ipynb", ".git/x.ipynb", "lib/x.ipynb", "full.ipynb", "folder.ipynb",
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_would_replace_something_is_refused_before_anything_is_touched(guarded, record):
    before = tree(guarded.parent)
    with pytest.raises(InputError) as refusal:
        attempt(guarded, record=record.format(outside=guarded.parent / "elsewhere"), out="out.txt")
    assert tree(guarded.parent) == before
    assert "\n" not in str(refusal.value)


def test_outputs_that_lie_in_one_another_are_refused(guarded):
    make_notebook(guarded, WRITE, parameters='lr: float = 1.0\nsteps: int = 1\nout: str = ""\nresults: str = ""')
    for out, results in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/./b", "a/b")):
        with pytest.raises(InputError, match="lie in one another"):
            attempt(guarded, out=out, results=results)


def test_what_a_run_made_is_replaced_by_the_next_and_what_was_altered_since_is_not(guarded):
    for _ in range(2):
        assert attempt(guarded, out="out.txt") == 0
    (guarded / "out.txt").write_text("my own text by now", encoding="utf-8")
    with pytest.raises(InputError, match=r"out\.txt exists and was not made by this notebook"):
        attempt(guarded, out="out.txt")
    assert (guarded / "out.txt").read_text(encoding="utf-8") == "my own text by now"
    assert attempt(guarded, out="data/other.txt") == 0


def test_a_folder_that_a_run_made_is_replaced_unless_somebody_put_something_there(guarded):
    make_notebook(guarded, "from pathlib import Path\nfrom trimtab.files import atomic\n"
                  "with atomic(Path(out)) as p:\n    p.mkdir()\n    (p / 'a').write_text(name)")  # fmt: skip
    for _ in range(2):
        assert attempt(guarded, out="data/toy") == 0
        assert {path.name for path in (guarded / "data/toy").iterdir()} == {"a", MARK}
    (guarded / "data/toy/mine").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="data/toy holds mine, which no run made"):
        attempt(guarded, out="data/toy")
    assert (guarded / "data/toy/mine").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("program", [FOLDER, PLAIN], ids=["atomic", "plain"])
@pytest.mark.parametrize("change", ["edit", "empty folder", "linked folder", "replaced", "mark", "moved and linked"])
def test_whatever_the_user_did_in_an_output_folder_is_kept(guarded, program, change):
    make_notebook(guarded, program)
    assert attempt(guarded, out="data/toy") == 0
    folder = guarded / "data/toy"
    match change:
        case "edit":
            (folder / "deep/a").write_text("mine", encoding="utf-8")
        case "empty folder":
            (folder / "deep/mine").mkdir()
        case "linked folder":
            (folder / "mine").symlink_to(guarded / "docs")
        case "replaced":
            (folder / "deep/a").unlink()
            (folder / "deep/a").mkdir()
        case "mark":
            (folder / MARK).write_text("mine", encoding="utf-8")
        case "moved and linked":
            folder.rename(guarded / "docs/toy")
            folder.symlink_to(guarded / "docs/toy")
    before = everything(guarded)
    with pytest.raises(InputError) as refusal:
        attempt(guarded, out="data/toy")
    assert "\n" not in str(refusal.value)
    assert everything(guarded) == before


def test_an_output_that_holds_a_linked_folder_fails_its_run(guarded):
    make_notebook(guarded, PLAIN, "(Path(out) / 'linked').symlink_to(Path('docs').absolute())")
    assert attempt(guarded, out="data/toy") == 1
    assert "is a link to a folder" in str(read_record(guarded / "records/toy.ipynb"))
    assert (guarded / "docs/page.md").read_text(encoding="utf-8") == "mine"


def test_a_record_that_somebody_wrote_into_is_kept(guarded):
    assert attempt(guarded, out="out.txt") == 0
    record = guarded / "records/toy.ipynb"
    record.write_text(record.read_text(encoding="utf-8").replace("# A toy", "# My notes"), encoding="utf-8")
    before = tree(guarded)
    with pytest.raises(InputError, match=r"records/toy\.ipynb exists and is not as a run made it"):
        attempt(guarded, out="out.txt")
    assert tree(guarded) == before


def test_what_one_record_has_claimed_no_other_replaces(guarded):
    names = ["records/a/b.ipynb", "records/a-b.ipynb", "records/a/b-c.ipynb", "records/a-b/c.ipynb"]
    claims = [Places(guarded, Path("toy.ipynb"), Path(name), {"out": Path("x")}) for name in names]
    assert len({each.claim for each in claims}) == len(names)
    claims[0].begin()  # and is killed
    (guarded / "x").write_text("half", encoding="utf-8")
    for other in claims[1:]:
        with pytest.raises(InputError, match="x exists and was not made by this notebook"):
            other.begin()
    again = Places(guarded, Path("toy.ipynb"), Path("records/../records/a/b.ipynb"), {"out": Path("x")})
    again.begin()
    assert not (guarded / "x").exists()


@pytest.mark.parametrize("name", ["n" * 300, "\u00fc" * 128, "n" * 300 + "/x", "a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_refused_in_one_sentence(guarded, name):
    before = tree(guarded)
    for given in ({"out": name}, {"out": f"data/{name}"}, {"out": "x", "record": f"records/{name}.ipynb"}):
        with pytest.raises(InputError, match=r"is no path: it holds|is too long: |must hold no control") as refusal:
            attempt(guarded, **given)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match=r"is no path: it holds|\.\.\. is too long: "):
        run_notebook(Path(name), Path("records/x.ipynb"), root=guarded, sections=[], settings={}, outputs={})
    assert tree(guarded) == before


def test_after_a_kill_the_next_run_replaces_what_was_left(guarded):
    make_notebook(guarded, WRITE, "import os, signal\nif lr > 1:\n    os.kill(os.getppid(), signal.SIGKILL)")
    program = "from trimtab.pipeline.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "toy.ipynb", "--section", "toy", "--out", "out=out.txt"]
    killed = subprocess.run([*command, "--set", "lr=2.0"], cwd=guarded, env=environment(guarded), check=False)
    assert killed.returncode == -9
    assert (guarded / "out.txt").exists()
    done = subprocess.run(
        command, cwd=guarded, env=environment(guarded), check=False, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert read_record(guarded / "records/toy.ipynb").metadata.trimtab.status == "complete"


def test_of_two_runs_of_one_record_the_second_is_refused_and_the_first_finishes(guarded):
    make_notebook(guarded, WRITE, "import time\nfrom pathlib import Path\nPath('begun').touch()\n"
                  "while not Path('go').exists():\n    time.sleep(0.05)")  # fmt: skip
    program = "from trimtab.pipeline.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "toy.ipynb", "--section", "toy", "--out", "out=out.txt"]
    with subprocess.Popen(command, cwd=guarded, env=environment(guarded)) as first:
        try:
            deadline = time.monotonic() + 120
            while not (guarded / "begun").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for record, out in (
                ("records/toy.ipynb", "out.txt"),
                ("records/toy.ipynb", "b.txt"),
                ("records/b.ipynb", "out.txt"),
            ):
                with pytest.raises(InputError, match="is being written by another run"):
                    attempt(guarded, record=record, out=out)
        finally:
            (guarded / "go").touch()
        assert first.wait(120) == 0
    assert read_record(guarded / "records/toy.ipynb").metadata.trimtab.status == "complete"
    assert (guarded / "out.txt").read_text(encoding="utf-8") == "x"
