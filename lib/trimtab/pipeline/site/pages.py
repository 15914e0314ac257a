"""What the builder reads: the front page with every claim, a page for each record, a page of the run."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat

from trimtab.claims import Verdict
from trimtab.pipeline.archive import Filed, effect_of
from trimtab.pipeline.site import graph
from trimtab.pipeline.site.calm import inline
from trimtab.pipeline.site.display import badge, page_of, plainly
from trimtab.pipeline.site.parameters import Annotated

PAPERS = {
    "steering": "Steering LLM Reasoning Through Bias-Only Adaptation",
    "mqar": "Linear Transformers with Learnable Kernel Functions (ReBased)",
    "pretrain": "Linear Transformers with Learnable Kernel Functions (ReBased)",
    "sae": "HierarchicalTopK",
    "repetition": "Implicit Unlikelihood Training",
}
"""By the beginning of a record's name."""
OTHERS = "Text and activations"
WIDE = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n"
"""Front matter of a page that is a table."""


def write_pages(root: Path, source: Path, records: Sequence[Filed]) -> None:
    """Sphinx's source folder, from records and what `root` has: conf/ for the parameters, dvc.yaml for the graph."""
    annotated = Annotated.of(root)
    for each in records:
        path = source / "records" / f"{each.label}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page_of(each, annotated), path)
    (source / "index.md").write_text("\n".join(_index(records)) + "\n", encoding="utf-8")
    (source / "run.md").write_text("\n".join(_run(root, records)) + "\n", encoding="utf-8")


def paper_of(label: str) -> str:
    """The paper that a record belongs to."""
    return next((title for start, title in PAPERS.items() if label.startswith(start)), OTHERS)


def _index(records: Sequence[Filed]) -> Iterator[str]:
    verdicts = [(each, verdict) for each in records for verdict in each.verdicts.values()]
    scales = (str(each.parameters["scale"]) for each in records if "scale" in each.parameters)
    scale = re.sub(r"[^\w.+-]", "_", next(scales, "unknown"))
    yield f"{WIDE}\n# Trimtab\n"
    yield (
        "Four papers about small levers on language models, rebuilt as one pipeline of notebooks. Every number here was"
        f" computed by [one run](run.md) at the scale `{scale}`; each verdict leads to the notebook that computed it.\n"
    )
    yield f"## {len(verdicts)} claims\n"
    counted = _counted([verdict for _, verdict in verdicts])
    yield f"{counted}; each stands, with its threshold, in its notebook before the run.\n"
    for title in dict.fromkeys(paper_of(each.label) for each, _ in verdicts):
        own = [(each, verdict) for each, verdict in verdicts if paper_of(each.label) == title]
        yield f"### {title}\n\n{_counted([verdict for _, verdict in own])}.\n"
        yield ":::{container} wide\n"
        yield "| claim | verdict | effect (95 %) | held if | what is compared | over | control | record |"
        yield "|---|---|---|---|---|---|---|---|"
        for each, found in own:
            verdict = plainly(found)
            yield (
                f"| {verdict.text} | {badge(found.outcome)} | {effect_of(verdict)} | {verdict.rule} | "
                f"{verdict.statistic} | {verdict.n} | {verdict.control} | [{each.label}](records/{each.label}.ipynb) |"
            )
        yield "\n:::\n"
    for title in dict.fromkeys(paper_of(each.label) for each in records):
        yield f"```{{toctree}}\n:hidden:\n:caption: {title}\n"
        yield from (f"{each.label} <records/{each.label}>" for each in records if paper_of(each.label) == title)
        yield "```\n"
    yield "```{toctree}\n:hidden:\n:caption: How it was made\n\nrun\n```"


def _counted(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    return ", ".join(f"{counts[key]} {key}" for key in ("held", "not held", "inconclusive") if counts[key])


def _run(root: Path, records: Sequence[Filed]) -> Iterator[str]:
    edges, counts = graph.of_pipeline(graph.stages_of(root))
    links = {each.label.split("/")[0]: f"records/{each.label}.html" for each in reversed(records)}
    yield f"{WIDE}\n# The run\n"
    yield "Each stage is one notebook; an arrow leads to what reads its outputs. Boxes lead to records.\n"
    yield f"```{{raw}} html\n<div class=wide>{graph.svg(edges, counts, links)}</div>\n```\n"
    yield "## Stages\n\n:::{container} wide\n"
    yield "| record | wall time | peak memory | commit | hardware |\n|---|---|---|---|---|"
    for each in records:
        made = {key: inline(value.replace("`", "")) for key, value in each.provenance.items()}
        row = " | ".join(made.get(key, "") for key in ("wall time", "peak memory", "commit", "hardware"))
        yield f"| [{each.label}](records/{each.label}.ipynb) | {row} |"
    yield "\n:::\n\n## Versions\n"
    for versions in dict.fromkeys(each.provenance.get("versions", "") for each in records):
        yield f"- {inline(versions)}"
