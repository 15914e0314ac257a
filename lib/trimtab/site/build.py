"""Pages from records, and a static site from the pages: Sphinx with myst-nb, nothing executed, nothing fetched."""

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from trimtab.errors import InputError
from trimtab.files import atomic
from trimtab.pipeline.archive import Filed, find
from trimtab.site import graph
from trimtab.site.display import badge, interval, page_of
from trimtab.site.parameters import Annotated

STATIC = Path(__file__).parent / "static"
PAPERS = {
    "steering": "Steering LLM Reasoning Through Bias-Only Adaptation",
    "mqar": "ReBased: Linear Transformers with Learnable Kernel Functions",
    "pretrain": "ReBased: Linear Transformers with Learnable Kernel Functions",
    "sae": "HierarchicalTopK",
    "repetition": "Implicit Unlikelihood Training",
}
"""By the beginning of a record's name."""
SETTINGS: dict[str, Any] = {
    "project": "Trimtab",
    "extensions": ["myst_nb", "sphinx-mathjax-offline"],
    "html_theme": "sphinx_book_theme",
    "html_title": "Trimtab",
    "html_static_path": [str(STATIC)],
    "html_css_files": ["trimtab.css"],
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_theme_options": {
        "show_toc_level": 2,
        "use_download_button": False,
        "use_fullscreen_button": False,
        "home_page_in_toc": True,
    },
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},
    "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence"],
    "myst_heading_anchors": 3,
    "suppress_warnings": ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"],
}


def build(root: Path, out: Path, names: Sequence[str]) -> None:
    """Render the named records. Raises InputError for a missing or failed one, and where a page does not render."""
    records = [find(root, name) for name in names]
    failed = [each.label for each in records if each.about["status"] != "complete"]
    if failed:
        raise InputError(f"records/{failed[0]}.ipynb is the record of a failed run: run its stage again before.")
    with tempfile.TemporaryDirectory() as folder:
        source, pages = Path(folder) / "source", Path(folder) / "html"
        write_sources(root, source, records)
        _sphinx(source, pages, Path(folder) / "doctrees")
        with atomic(out) as partial:
            shutil.copytree(pages, partial)


def write_sources(root: Path, source: Path, records: Sequence[Filed]) -> None:
    """What Sphinx reads."""
    annotated = Annotated.of(root)
    for each in records:
        path = source / "records" / f"{each.label}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page_of(each, annotated), path)
    (source / "index.md").write_text("\n".join(_index(records)), encoding="utf-8")
    (source / "run.md").write_text("\n".join(_run(root, records)), encoding="utf-8")


def _sphinx(source: Path, out: Path, doctrees: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    told = io.StringIO()
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                str(source), None, str(out), str(doctrees), "html", SETTINGS, status=None, warning=told, freshenv=True
            )
            app.build()
    except SphinxError as error:
        raise InputError(f"The site cannot be built: {error}") from error
    if app.statuscode or told.getvalue():
        raise InputError(f"The site was built with warnings: {told.getvalue().strip()}")


def _index(records: Sequence[Filed]) -> list[str]:
    verdicts = [(each, verdict) for each in records for verdict in each.verdicts.values()]
    counts = Counter(verdict.outcome for _, verdict in verdicts)
    told = ", ".join(f"{counts[key]} {key}" for key in ("held", "not held", "inconclusive") if counts[key])
    rows = [
        f"| {verdict.text} | {badge(verdict.outcome)} | {interval(verdict)} | {verdict.rule} | {verdict.statistic} "
        f"| {verdict.n} | [{each.label}](records/{each.label}.ipynb) |"
        for each, verdict in verdicts
    ]
    groups: dict[str, list[Filed]] = {}
    for each in records:
        groups.setdefault(paper_of(each.label), []).append(each)
    lines = [
        "# Trimtab", "",
        "Four papers about small levers on language models, rebuilt as one pipeline. Every number here was computed by "
        "it: see [the run](run.md).", "",
        "## Claims", "", f"{len(verdicts)} claims, stated before they were tested: {told}.", "",
        ":::{container} claims", "", "| claim | verdict | effect (95 %) | held if | measured | over | record |",
        "|---|---|---|---|---|---|---|", *rows, "", ":::", "",
    ]  # fmt: skip
    for title, some in groups.items():
        lines += [
            f"```{{toctree}}\n:hidden:\n:caption: {title}\n", *[f"records/{each.label}" for each in some], "```", ""
        ]
    return [*lines, "```{toctree}\n:hidden:\n:caption: The run\n", "run", "```"]


def _run(root: Path, records: Sequence[Filed]) -> list[str]:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        outs = {Path(out.fs_path): stage.addressing for stage in repo.index.stages for out in stage.outs}
        stages = [
            (
                stage.addressing,
                [
                    name
                    for dep in stage.deps
                    for path, name in outs.items()
                    if dep.protocol == "local" and (Path(dep.fs_path) == path or Path(dep.fs_path) in path.parents)
                ],
            )
            for stage in repo.index.stages
        ]
    labels = {each.label for each in records}
    edges, counts = graph.of_pipeline(stages)
    links = {}
    for name in counts:
        own = [label for label in labels if label.split("/")[0] == name]
        if own:
            links[name] = f"records/{min(own)}.html"
    rows = []
    for each in records:
        made = {key: value.replace("`", "") for key, value in each.provenance.items()}
        rows.append(
            f"| [{each.label}](records/{each.label}.ipynb) | {made.get('wall time', '')} | {made.get('peak memory', '')} "
            f"| {made.get('commit', '')} | {made.get('hardware', '')} |"
        )
    return [
        "# The run", "", "```{raw} html", graph.svg(edges, counts, links), "```", "",
        "| record | wall time | peak memory | commit | hardware |", "|---|---|---|---|---|", *rows,
    ]  # fmt: skip


def paper_of(label: str) -> str:
    """The paper that a record belongs to."""
    return next((title for start, title in PAPERS.items() if label.startswith(start)), "Data")

