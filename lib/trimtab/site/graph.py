"""The pipeline's graph as a picture: stages of one name are one box, which leads to their record."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, GAP_X, GAP_Y = 150, 40, 26, 46
"""Of a box, and between boxes, in pixels."""


def svg(edges: Sequence[tuple[str, str]], counts: Mapping[str, int], links: Mapping[str, str]) -> str:
    """Boxes in layers, from what comes first at the top (Sugiyama's layout, by grandalf). `edges`: (from, to)."""
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout

    class Box:
        w, h = WIDTH, HEIGHT
        xy = (0.0, 0.0)

    vertices = {name: Vertex(name) for name in counts}
    for vertex in vertices.values():
        vertex.view = Box()
    graph = Graph(list(vertices.values()), [Edge(vertices[a], vertices[b]) for a, b in edges])
    offset, places, lines = 0.0, {}, []
    for part in graph.C:
        layout = SugiyamaLayout(part)
        layout.xspace, layout.yspace = GAP_X, GAP_Y
        layout.init_all(roots=[v for v in part.sV if not v.e_in()])
        layout.draw(8)
        left = min(v.view.xy[0] for v in part.sV)
        for v in part.sV:
            places[v.data] = (v.view.xy[0] - left + offset + WIDTH / 2, v.view.xy[1])
        offset = max(places[v.data][0] for v in part.sV) + WIDTH / 2 + GAP_X
    top = min(y for _, y in places.values())
    places = {name: (x, y - top + HEIGHT / 2 + 4) for name, (x, y) in places.items()}
    for a, b in edges:
        (x1, y1), (x2, y2) = places[a], places[b]
        y1, y2 = y1 + HEIGHT / 2, y2 - HEIGHT / 2
        bend = (y2 - y1) / 2
        lines.append(f'<path d="M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"/>')
    boxes = [_box(name, places[name], counts[name], links.get(name)) for name in counts]
    width = max(x for x, _ in places.values()) + WIDTH / 2 + 4
    height = max(y for _, y in places.values()) + HEIGHT / 2 + 4
    return (
        f'<svg class="pipeline" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="stages and what they need">'
        f'<g class="lines">{"".join(lines)}</g>{"".join(boxes)}</svg>'
    )


def _box(name: str, place: tuple[float, float], count: int, link: str | None) -> str:
    x, y = place
    label = html.escape(name) + (f" × {count}" if count > 1 else "")
    box = (
        f'<g class="box"><rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{label}</text></g>'
    )
    return f'<a href="{html.escape(link)}">{box}</a>' if link else box


def of_pipeline(stages: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(edges, how many stages bear each name) from (stage as DVC names it, those that it needs)."""
    counts = Counter(name.partition("@")[0] for name, _ in stages)
    pairs = [(need.partition("@")[0], name.partition("@")[0]) for name, needs in stages for need in needs]
    edges = [(a, b) for a, b in dict.fromkeys(pairs) if a != b]
    # What is needed by way of another need not be drawn.
    after = {name: {b for a, b in edges if a == name} for name in counts}

    def reach(name: str) -> set[str]:
        found: set[str] = set()
        todo = list(after[name])
        while todo:
            if (one := todo.pop()) not in found:
                found.add(one)
                todo += after[one]
        return found

    beyond = {name: set().union(*(reach(b) for b in after[name])) if after[name] else set() for name in counts}
    return [(a, b) for a, b in edges if b not in beyond[a]], dict(counts)
