"""A site of a few records that hold what a model might have written."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.pages import HOSTILE
from trimtab.pipeline.archive import Filed
from trimtab.pipeline.records import FORMAT
from trimtab.pipeline.site.build import render

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CLAIM = {
    "name": "c", "text": "The untrained model repeats far more than people do", "statistic": "seq-rep-4, greedily",
    "rule": "above 0.1", "outcome": "held", "effect": 0.396, "low": 0.275, "high": None, "n": "3 seeds",
}  # fmt: skip
PROVENANCE = """**Provenance**

| | |
|---|---|
| notebook | `notebooks/repetition_compare.ipynb`, sections `base`, `repetition_compare` |
| commit | `0123456789ab` |
| versions | python 3.11 |
| hardware | two cores |
| wall time | 12 s |
| peak memory | 1.00 GiB |"""
LONG = 1_000_000


def record(label: str, *outputs: nbformat.NotebookNode, claims=(), **parameters) -> Filed:
    cells = [
        new_markdown_cell(f"# Record {label}\n\n**Question.** Does $x^2$ fold?"),
        new_markdown_cell(PROVENANCE, metadata={"tags": ["provenance"]}),
        new_markdown_cell("## A section\n\nText."),
        new_code_cell("print('some code')", outputs=list(outputs), execution_count=1),
    ]
    about = {
        "format": FORMAT, "status": "complete", "notebook": "notebooks/x.ipynb",
        "parameters": {"scale": "laptop", "seed": 0, **parameters},
        "results": {"metrics": {}, "claims": list(claims)},
    }  # fmt: skip
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "trimtab": about}
    return Filed(label, new_notebook(cells=cells, metadata=metadata))


@pytest.fixture(scope="session")
def hostile() -> Filed:
    """Everything that a model could write where a page could take it for more than text."""
    bold = f"<div style='position: fixed; color: red' onclick='alert(1)'>{HOSTILE}<img src=x onerror=alert(1)></div>"
    return record(
        "repetition/implicit",
        new_output("stream", text=HOSTILE + "\n" + "a" * LONG + "\n"),
        new_output("display_data", data={"text/html": bold, "text/plain": HOSTILE}),
        new_output("display_data", data={"application/javascript": "alert(1)", "text/plain": HOSTILE}),
        new_output("display_data", data={"image/png": PIXEL}, metadata={"image/png": {"width": '1" onload="alert(1)'}}),
        shown=HOSTILE,
    )


@pytest.fixture(scope="session")
def site(hostile, root, tmp_path_factory) -> Path:
    table = "<table class='dataframe'><thead><tr><th>arm</th></tr></thead><tbody><tr><td>0.5</td></tr></tbody></table>"
    several = [
        record("corpus"),
        hostile,
        record("repetition_compare", new_output("display_data", data={"text/html": table}), claims=[CLAIM], clusters=9),
    ]
    out = tmp_path_factory.mktemp("site") / "site"
    render(root, out, several)
    return out


@pytest.fixture(scope="session")
def served(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
