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
from trimtab.pipeline.records import FORMAT, signed
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


ELSEWHERE = "http://elsewhere.invalid/x"
LOADING = f"""
![a picture]({ELSEWHERE}.png) and ![another][p] and <img src="{ELSEWHERE}.gif"> and {{raw-html}}`x`

```{{image}} {ELSEWHERE}.svg
```

<iframe src="{ELSEWHERE}"></iframe> <b style="background: url({ELSEWHERE})" class="position-fixed">bold</b>
<script>fetch("{ELSEWHERE}")</script>

```{{raw}} html
<link rel="stylesheet" href="{ELSEWHERE}.css"><meta http-equiv="refresh" content="0;url={ELSEWHERE}">
```

```{{eval-rst}}
.. meta::
   :http-equiv=refresh: 0;url={ELSEWHERE}

.. image:: {ELSEWHERE}.webp
```

:::{{container}} position-fixed top-0
Over everything.
:::

A formula $x\\\\[999em]y$, a sign a&#x202e;b, and <b style="color: transparent">bold</b>.

[p]: {ELSEWHERE}.jpeg
""".replace("{raw-html}`x`", "a role")
"""Markdown that would load, or move, if it could."""


TRICKS = [
    f"<div style='background:url({ELSEWHERE})'>x</div>",
    f"<div style='background: URL( \"{ELSEWHERE}\" )'>x</div>",
    f"<div style='background:u\\72l({ELSEWHERE})'>x</div>",
    f"<div style='background/**/:image-set(\"{ELSEWHERE}\" 1x)'>x</div>",
    f"<div style='--a:url({ELSEWHERE});background:var(--a)'>x</div>",
    f"<div style=\"font-family:'a;background:url({ELSEWHERE})'\">x</div>",
    f"<div style='width:expression(fetch(\"{ELSEWHERE}\"))'>x</div>",
    f"<table background='{ELSEWHERE}'><tr><td background='{ELSEWHERE}'>x</td></tr></table>",
    f"<video poster='{ELSEWHERE}' autoplay src='{ELSEWHERE}'></video><audio src='{ELSEWHERE}'></audio>",
    f"<object data='{ELSEWHERE}'></object><embed src='{ELSEWHERE}'><iframe srcdoc='<img src={ELSEWHERE}>'></iframe>",
    f"<svg><image href='{ELSEWHERE}'/><use xlink:href='{ELSEWHERE}'/><style>@import '{ELSEWHERE}';</style></svg>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src={ELSEWHERE}&gt;'>",
    f"<link rel=prefetch href='{ELSEWHERE}'><base href='{ELSEWHERE}'>",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}'>",
    f"<style>body {{ background: url({ELSEWHERE}) }}</style><script src='{ELSEWHERE}'></script>",
    f"<img srcset='{ELSEWHERE} 2x'>",
    f"<picture><source srcset='{ELSEWHERE}'></picture><input type=image src='{ELSEWHERE}'>",
    f"<q cite='{ELSEWHERE}'>x</q><a href='{ELSEWHERE}' ping='{ELSEWHERE}'>x</a>",
    f"<form action='{ELSEWHERE}'><button>x</button></form>",
    "<div class='position-fixed top-0 stretched-link modal'>x</div>",
    "<div style='margin:-900px 0 0 -900px'>x</div><div style='margin: 1e9px; padding: 99999px'>x</div>",
    "<div style='position:absolute;top:0;transform:scale(9);z-index:9;float:left;display:none;opacity:0'>x</div>",
    "<p style='font-size: 9999px; vertical-align: 900px; width: 99999em'>x</p><td colspan=99999>x</td>",
]  # fmt: skip
"""HTML that would load, or move, if it could."""


def record(
    label: str, *outputs: nbformat.NotebookNode, claims=(), prose="## A section\n\nText.", **parameters
) -> Filed:
    cells = [
        new_markdown_cell(f"# Record {label}\n\n**Question.** Does $x^2$ fold?"),
        new_markdown_cell(PROVENANCE, metadata={"tags": ["provenance"]}),
        new_markdown_cell(prose),
        new_code_cell("print('some code')", outputs=list(outputs), execution_count=1),
    ]
    about = {
        "format": FORMAT, "status": "complete", "notebook": "notebooks/x.ipynb",
        "parameters": {"scale": "laptop", "seed": 0, **parameters},
        "results": {"metrics": {}, "claims": list(claims)}, "record": label, "outputs": {}, "library": {},
        "sections": ["base", "repetition_compare"],
    }  # fmt: skip
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "trimtab": about}
    return Filed(label, signed(new_notebook(cells=cells, metadata=metadata)))


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
        new_output("display_data", data={"text/markdown": LOADING, "text/plain": "Markdown"}),
        *(new_output("display_data", data={"text/html": trick, "text/plain": "HTML"}) for trick in TRICKS),
        new_output(
            "display_data", data={"image/svg+xml": f"<svg><image href='{ELSEWHERE}'/></svg>", "text/plain": "SVG"}
        ),
        new_output("display_data", data={"image/png": "no picture", "text/plain": "PNG"}),
        claims=[
            CLAIM | {"text": f"![x]({ELSEWHERE}) <img src={ELSEWHERE}> {{image}}`x` $\\href{{{ELSEWHERE}}}{{x}}$ | b"}
        ],
        prose=LOADING,
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
