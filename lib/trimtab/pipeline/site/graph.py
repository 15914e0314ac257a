"""The pipeline's graph as a picture: stages of one name are one box, which leads to their record."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path

WIDTH, HEIGHT, GAP_X, GAP_Y = 150, 40, 26, 46
"""Of a box, and between boxes, in pixels."""
RENDERING = ("report", "site")
"""Stages that read everything and make nothing new."""


def stages_of(root: Path) -> list[tuple[str, list[str]]]:
    """Every stage of the pipeline, as DVC names it, with those whose outputs it reads."""
    from dvc.repo import Repo

    with chdir(root), Repo(str(root)) as repo:  # DVC names stages as seen from the working directory
        stages = [stage for stage in repo.index.stages if stage.name not in RENDERING]
        made = {Path(out.fs_path): stage.addressing for stage in stages for out in stage.outs}
        read = [(s.addressing, [Path(dep.fs_path) for dep in s.deps if dep.protocol == "local"]) for s in stages]
    # A stage may read a folder into which several write.
    return [
        (name, [made[out] for out in made for path in paths if path == out or path in out.parents])
        for name, paths in read
    ]


def of_pipeline(stages: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(edges from what is read to what reads it, how many stages bear each name), with `sae@topk-8` as `sae`. What is
    needed by way of another stage has no edge of its own."""
    counts = Counter(name.partition("@")[0] for name, _ in stages)
    pairs = [(need.partition("@")[0], name.partition("@")[0]) for name, needs in stages for need in needs]
    edges = [(a, b) for a, b in dict.fromkeys(pairs) if a != b]
    after = {name: {b for a, b in edges if a == name} for name in counts}

    def beyond(name: str) -> set[str]:
        return after[name].union(*map(beyond, after[name]))

    direct = [(a, b) for a, b in edges if not any(b in beyond(other) for other in after[a] - {b})]
    return direct, dict(counts)


def layout(edges: Sequence[tuple[str, str]], names: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """The middle of each box, in layers, what comes first at the top (Sugiyama's layout, by grandalf)."""
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout, VertexViewer

    vertices = {name: Vertex(name) for name in names}
    for vertex in vertices.values():
        vertex.view = VertexViewer(WIDTH, HEIGHT)
    graph = Graph(list(vertices.values()), [Edge(vertices[a], vertices[b]) for a, b in edges])
    places: dict[str, tuple[float, float]] = {}
    offset = 0.0
    for part in graph.C:
        drawn = SugiyamaLayout(part)
        drawn.xspace, drawn.yspace = GAP_X, GAP_Y
        drawn.init_all(roots=[vertex for vertex in part.sV if not vertex.e_in()])
        drawn.draw(8)
        left, top = (min(vertex.view.xy[axis] for vertex in part.sV) for axis in (0, 1))
        for vertex in part.sV:
            x, y = vertex.view.xy
            places[vertex.data] = (x - left + offset + WIDTH / 2 + 2, y - top + HEIGHT / 2 + 2)
        offset = max(x for x, _ in places.values()) + WIDTH / 2 + GAP_X
    return places


def svg(
    edges: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
    links: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
) -> str:
    """A picture with no script in it; `links`: where a box leads, `kinds`: a CSS class for a box."""
    kinds = kinds or {}
    places = layout(edges, counts)
    lines = []
    for a, b in edges:
        (x1, y1), (x2, y2) = places[a], places[b]
        y1, y2 = y1 + HEIGHT / 2, y2 - HEIGHT / 2
        middle = (y1 + y2) / 2
        lines.append(f'<path d="M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"/>')
    boxes = [_box(name, places[name], counts[name], links.get(name), kinds.get(name, "")) for name in counts]
    width, height = (max(place[axis] for place in places.values()) for axis in (0, 1))
    return (
        f'<svg class="pipeline" viewBox="0 0 {width + WIDTH / 2 + 2:.0f} {height + HEIGHT / 2 + 2:.0f}" role="img" '
        f'aria-label="stages and what they read"><g class="lines">{"".join(lines)}</g>{"".join(boxes)}</svg>'
    )


def _box(name: str, place: tuple[float, float], count: int, link: str | None, kind: str) -> str:
    x, y = place
    label = html.escape(name) + (f" × {count}" if count > 1 else "")
    left, top, kinds = x - WIDTH / 2, y - HEIGHT / 2, f"box {kind}".strip()
    box = (
        f'<g class="{kinds}"><rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{label}</text></g>'
    )
    return f'<a href="{html.escape(link)}">{box}</a>' if link else box
