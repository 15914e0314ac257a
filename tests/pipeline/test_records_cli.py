"""Records of a toy pipeline, run by DVC: listed, shown, compared, and believed only while everything still matches."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from tests.pages import HOSTILE, Reader
from trimtab.errors import InputError
from trimtab.pipeline.archive import find
from trimtab.pipeline.conditions import State, conditions
from trimtab.pipeline.differences import Difference, page, render
from trimtab.pipeline.overview import COLOURS, picture, sources_of, table
from trimtab.pipeline.records import FORMAT, read_record

from .recorded import ask, change, commit_all, set_parameters
from .toy import call


@pytest.fixture
def project(copied) -> Path:
    """A copy to do harm to."""
    return copied


def test_what_the_pipeline_made_is_fresh(project):
    (found,) = conditions(project)
    assert (found.stage, found.record, found.state, found.reasons) == ("toy", "toy", "fresh", ())
    assert ask("verify") == (0, "1 of 1 stages are fresh.\n")


def test_records_are_listed_with_their_claims_and_commits(project):
    _, shown = ask("list")
    row = next(line for line in shown.splitlines() if " toy " in line)
    assert "fresh" in row
    assert "1 held" in row
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD~1"], capture_output=True, encoding="utf-8", check=True
    )
    assert head.stdout.strip() in row  # it was run before it was committed


def test_one_is_shown(project):
    _, shown = ask("show", "toy")
    for word in ("A toy", "It works", "held: 0.5 (0.4 to unbounded), above 0", "arm, k=2", "torch "):
        assert word in shown


def harmed(project: Path, edit) -> tuple[str, str]:
    change(project, edit)
    (found,) = conditions(project)
    code, shown = ask("verify")
    assert code == 1
    assert f"toy: {found.state}: " in shown
    return found.state, shown


def test_an_altered_record_is_named(project):
    def edit(record):
        record["cells"][-1]["outputs"] = []

    state, shown = harmed(project, edit)
    assert state == "altered"
    assert "records/toy.ipynb is not what its run wrote" in shown


def test_altered_results_are_named(project):
    path = project / "data/results/toy.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"held"', '"not held"'), encoding="utf-8")
    (found,) = conditions(project)
    assert found.state == "altered"
    assert found.reasons == ("data/results/toy.json is not what its run wrote",)


def test_a_record_of_other_parameters_is_named_even_where_dvc_was_told_to_take_it(project):
    change(project, lambda record: record["metadata"]["trimtab"]["parameters"].update(lr=0.75), sign=True)
    commit_all(project)
    (found,) = conditions(project)
    assert found.state == "altered"
    assert found.reasons == ("the record was run with lr = 0.75, dvc.lock has 0.5",)


def test_what_a_record_says_of_itself_is_text_to_the_terminal(project):
    def edit(record):
        (cell,) = [cell for cell in record["cells"] if "provenance" in cell["metadata"].get("tags", [])]
        rows = "| commit | `[red]0123[/red]` |\n| wall time | [/] \x1b[31m\x07 |\n| [b]x | [bold]y |\n"
        cell["source"] = rows + "| |"
        record["cells"][0]["source"] = "# [link=https://example.org]A toy[/link]"

    change(project, edit, sign=True)
    for command in (("list",), ("show", "toy"), ("diff", "toy")):
        code, shown = ask(*command)
        assert code == 0
        assert "\x1b" not in shown
        assert "[/" in shown
    assert "[red]0123[/red]" in ask("list")[1]


def test_a_page_replaces_a_page_and_nothing_else(project):
    (project / "notes.html").write_text("mine", encoding="utf-8")
    (project / "docs").mkdir()
    for name in ("notes.html", "docs"):
        with pytest.raises(InputError, match=name):
            ask("diff", "toy", "--html", name)
    assert (project / "notes.html").read_text(encoding="utf-8") == "mine"
    assert (project / "docs").is_dir()
    for _ in range(2):
        assert ask("diff", "toy", "--html", "page.html")[0] == 0


def test_a_record_from_a_newer_version_is_refused_in_one_sentence(project):
    state, shown = harmed(project, lambda record: record["metadata"]["trimtab"].update(format=FORMAT + 1))
    assert state == "altered"
    assert f"was written by a newer Trimtab (records of format {FORMAT + 1}, this one reads up to {FORMAT})" in shown
    with pytest.raises(InputError, match="newer Trimtab"):
        find(project, "toy")
    assert "altered" in ask("list")[1]


def test_a_notebook_that_is_no_record_is_refused(project):
    with pytest.raises(InputError, match="is a notebook, but no record"):
        find(project, "notebooks/toy.ipynb")
    (project / "records/toy.ipynb").unlink()
    (project / "records/toy.ipynb").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no text"):
        read_record(project / "records/toy.ipynb")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda p: set_parameters(p, lr=0.75), "params.yaml"),
        (
            lambda p: (p / "notebooks/toy.ipynb").write_text(
                (p / "notebooks/toy.ipynb").read_text(encoding="utf-8") + "\n", encoding="utf-8"
            ),
            "toy.ipynb",
        ),
        (lambda p: (p / "notebooks/toy.ipynb").rename(p / "notebooks/other.ipynb"), "notebooks/toy.ipynb deleted"),
    ],
)
def test_a_stale_record_is_named_with_what_changed(project, harm, reason):
    harm(project)
    (found,) = conditions(project)
    assert found.state == "stale"
    assert reason in " ".join(found.reasons)


def test_what_is_missing_or_was_never_run_is_named(project):
    (project / "records/toy.ipynb").unlink()
    (found,) = conditions(project)
    assert (found.state, found.reasons) == (
        "missing",
        (
            "records/toy.ipynb: brought back by `dvc checkout`, `dvc pull` or, where committed, `git checkout`; "
            "made anew by `dvc repro`",
        ),
    )
    set_parameters(project, lr=0.75)  # then what a cache holds is not what is wanted
    (found,) = conditions(project)
    assert (found.state, found.reasons) == (
        "stale",
        ("params.yaml: section toy modified", "records/toy.ipynb deleted"),
    )
    (project / "dvc.lock").unlink()
    (found,) = conditions(project)
    assert (found.state, found.reasons) == ("never run", ("make it with `dvc repro toy`",))
    (project / "dvc.lock").write_text("no: lock\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"dvc\.lock"):
        conditions(project)


def test_a_failed_run_is_named(project):
    set_parameters(project, fails=True)
    assert call(project, "dvc", "repro", "--quiet").returncode != 0
    (found,) = conditions(project)
    assert found.state == "failed"
    assert "records/toy.ipynb" in found.reasons[0]


def test_now_is_compared_with_a_commit_by_parameters_claims_metrics_and_cells(project):
    difference = Difference(find(project, "HEAD~1:toy"), find(project, "toy"))
    assert [(c.name, c.before, c.after) for c in difference.parameters] == [("lr", 0.25, 0.5)]
    assert [(c.name, c.before, c.after) for c in difference.metrics] == [("arm, k=2", 0.25, 0.5)]
    (claim,) = difference.claims
    assert (claim.before.outcome, claim.after.outcome) == ("not held", "held")
    assert "-lr is 0.25" in difference.cells.replace("  ", "")
    assert "+lr is 0.5" in difference.cells.replace("  ", "")
    _, shown = ask("diff", "HEAD~1:toy")
    for word in ("Parameters", "0.25", "+0.25 (+100.0%)", "not held: 0.25 (0.15 to unbounded)", "held: 0.5"):
        assert word in shown
    assert ask("diff", "HEAD~1:toy", "HEAD~1:toy")[1] == "HEAD~1:toy and HEAD~1:toy are the same but for provenance.\n"
    assert "HEAD:toy and toy are the same" in ask("diff", "toy")[1]


def test_of_a_record_that_does_not_hold_its_results_only_cells_are_compared(project):
    def edit(record):
        about = record["metadata"]["trimtab"]
        for key in ("format", "parameters", "results"):
            del about[key]

    change(project, edit)
    _, shown = ask("diff", "HEAD~1:toy")
    assert "Only cells are compared: toy does not hold parameters and results yet." in shown
    assert "lr is 0.5" in shown
    assert "Parameters" not in shown
    assert "toy" in ask("show", "toy")[1]


def test_the_page_of_a_difference_is_one_file_in_which_nothing_acts(project):
    def edit(record):
        record["cells"][-1]["outputs"][0]["text"] = HOSTILE
        record["metadata"]["trimtab"]["results"]["metrics"][HOSTILE] = 1

    change(project, edit)
    difference = Difference(find(project, "HEAD:toy"), find(project, "toy"))
    source = page(difference)
    assert "<script" not in source
    assert "http" not in source
    assert not set("\x1b\u202e\u2066\u200b\x00\x9b") & set(source)
    body = source[source.index("<pre") : source.index("</pre>") + len("</pre>")]
    assert "script" in Reader(body).text
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(difference))
    assert not set("\x1b\u202e\u2066\u200b\x00\x9b") & set(captured.get())
    assert ask("diff", "toy", "--html", "page.html")[0] == 0
    assert "<html" in (project / "page.html").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_do_what_it_says(project, root):
    commands = re.findall(
        r"^trimtab (records .*?)(?:  +#.*)?$", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(commands) == 6
    shutil.copyfile(project / "records/toy.ipynb", project / "old.ipynb")
    for command in commands:
        code, shown = ask(*command.removeprefix("records ").replace("sae_compare", "toy").split())
        assert code == 0
        assert shown or (project / "difference.html").is_file()


def test_what_is_not_there_is_named(project):
    with pytest.raises(InputError, match="nothing is no record"):
        find(project, "nothing")
    with pytest.raises(InputError, match="git knows no revision 'never'"):
        find(project, "never:toy")
    shutil.rmtree(project / ".dvc/cache")
    with pytest.raises(InputError, match=r"of HEAD~1 is not in DVC's cache: `dvc pull`"):
        find(project, "HEAD~1:toy")
    with pytest.raises(InputError, match="HEAD has no record 'nothing'"):
        find(project, "HEAD:nothing")


def test_the_overview_is_the_same_from_any_folder_and_tells_what_is_to_be_done(project, monkeypatch):
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert [each.stage for each in conditions(project)] == ["toy"]
    assert sources_of(project) == {"toy": "notebooks/toy.ipynb"}
    shown = table(project, conditions(project))
    read = Reader(shown)
    assert ("a", {"href": "../../records/toy.ipynb"}) in read.tags
    assert ("a", {"href": "../../notebooks/toy.ipynb"}) in read.tags
    assert "fresh" in read.text
    assert "dvc repro" not in read.text
    assert 'class="box fresh"' in picture(project, conditions(project))
    set_parameters(project, lr=0.75)
    stale = conditions(project)
    assert "dvc repro toy" in Reader(table(project, stale)).text
    assert "section toy modified" in Reader(table(project, stale)).text
    assert 'class="box stale"' in picture(project, stale)
    assert set(COLOURS) == set(get_args(State)), "a state has no colour"
