"""The page of records shows verdicts, metrics and one figure for each, and refuses a failed record."""

import base64
import json

import pytest

from trimtab.checkpoint import write_json
from trimtab.errors import InputError
from trimtab.pipeline.records import read_record, signed, write_record
from trimtab.pipeline.report import MARKS, _metric_tables, current_records, write_report

PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def results(project, name="toy"):
    claim = {
        "name": "c", "text": "It works", "statistic": "ratio", "rule": "above 0", "outcome": "held",
        "effect": 0.5, "low": 0.25, "high": 0.75, "n": "3 seeds",
    }  # fmt: skip
    metrics = {"rows": 1200, "topk-8": {"k=2": 0.12345, "k=16": 0.5}, "topk-16": {"k=2": 0.2, "k=16": 0.4}}
    write_json(project / f"data/results/{name}.json", {"metrics": metrics, "claims": [claim]})


def render(project):
    write_report(project, project / "records/README.md", project / "records/figures", ["toy"])
    return (project / "records/README.md").read_text(encoding="utf-8")


def test_a_record_is_rendered_with_its_claims_metrics_and_figure(project, run):
    import nbformat

    run("from pathlib import Path\nPath(out).write_text('x')", PLOT)
    path = project / "records/toy.ipynb"
    record = nbformat.read(path, as_version=4)
    plot = next(c for c in record.cells if "plt.plot" in c.source)
    plot.metadata["tags"] = ["figure"]
    write_record(signed(record), path)
    results(project)
    page = render(project)
    assert "| It works | **held** | ratio | 0.5 | 0.25 to 0.75 | above 0 | 3 seeds |" in page
    assert "| rows | 1,200 |" in page
    assert "| topk-8 | 0.1235 | 0.5 |" in page
    assert "A toy" in page
    assert '"lr": 0.5' in page
    png = (project / "records/figures/toy.png").read_bytes()
    assert png == base64.b64decode(next(o for o in plot.outputs if "data" in o).data["image/png"])
    assert "![A toy](figures/toy.png)" in page


def test_the_readme_gets_the_claims_between_its_marks_and_keeps_the_rest(project, run):
    run("from pathlib import Path\nPath(out).write_text('x')")
    results(project)
    readme = project / "README.md"
    readme.write_text("no marks", encoding="utf-8")
    render(project)
    assert readme.read_text(encoding="utf-8") == "no marks"
    readme.write_text(f"before\n{MARKS[0]}\n| old |\n{MARKS[1]}\nafter\n", encoding="utf-8")
    for _ in range(2):
        render(project)
        shown = readme.read_text(encoding="utf-8")
        assert shown.startswith(f"before\n{MARKS[0]}\n| claim | verdict |")
        assert "| It works | **held** |" in shown
        assert "old" not in shown
        assert shown.endswith(f"\n{MARKS[1]}\nafter\n")


def test_a_failed_record_is_not_reported(project, run):
    run("1 / 0")
    results(project)
    with pytest.raises(InputError, match=r"toy\.ipynb is the record of a failed run"):
        render(project)


def test_a_missing_record_is_named(project):
    with pytest.raises(InputError, match=r"toy\.ipynb does not exist"):
        render(project)


def test_the_records_of_the_pipeline_follow_the_arms_in_params_yaml(root):
    names = current_records(root)
    assert names[:2] == ["corpus", "activations"]
    assert names[-1] == "repetition_compare"
    assert {
        "sae/topk-8",
        "sae/hierarchical-64",
        "sae_random/hierarchical-64",
        "sae_compare",
        "repetition/implicit",
    } < set(names)


def test_a_record_that_has_been_altered_is_not_reported(project, run):
    run("from pathlib import Path\nPath(out).write_text('x')")
    results(project)
    path = project / "records/toy.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("A toy", "Another toy"), encoding="utf-8")
    with pytest.raises(InputError, match=r"toy\.ipynb has been altered since its run"):
        render(project)


def test_results_that_are_not_those_of_the_record_are_not_reported(project, run):
    run("from pathlib import Path\nPath(out).write_text('x')")
    path = project / "records/toy.ipynb"
    record = read_record(path)
    record.metadata["trimtab"]["results"] = {"metrics": {"rows": 1}, "claims": []}
    write_record(signed(record), path)
    results(project)
    with pytest.raises(InputError, match=r"toy\.json is not what records/toy\.ipynb says"):
        render(project)


def test_results_that_are_none_are_named(project, run):
    run("from pathlib import Path\nPath(out).write_text('x')")
    (project / "data/results").mkdir(parents=True)
    for content in ([], {}, {"metrics": {}}, {"metrics": [], "claims": []}, {"metrics": {}, "claims": [{}]}, 3):
        (project / "data/results/toy.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=r"toy\.json has"):
            render(project)


def test_odd_values_of_metrics_are_rendered_and_stay_in_their_cells():
    metrics = {
        "none": None, "a | b": "c | d\ne", "empty": {}, "list": [1, None], "true": True, "large": 10**400,
        "x": {"k": None, "deep": {"er": {"l": 1}}}, "y": {"k": 0.5}, "": {"": ""},
    }  # fmt: skip
    rows = "\n".join(_metric_tables(metrics)).split("\n")
    assert "| none | None |" in rows
    assert "| a \\| b | c \\| d e |" in rows
    assert "| x | None | {'er': {'l': 1}} |" in rows
    assert "| y | 0.5 |" in rows


def test_a_page_that_no_report_wrote_is_left_alone(project, run):
    run("from pathlib import Path\nPath(out).write_text('x')")
    results(project)
    page = project / "records/README.md"
    page.write_text("# My own notes\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md exists and was not written by Trimtab"):
        render(project)
    assert page.read_text(encoding="utf-8") == "# My own notes\n"
