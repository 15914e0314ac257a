"""Figures of the logit lens and of steering vectors: matplotlib for records, plotly with hover for JupyterLab."""

import functools
import html
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.interventions import LensComparison
from trimtab.plots import COLOURS, figure
from trimtab.steering.panels import Panel, comparison_panels, shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Interactive

LONGEST = 9
"""Characters of a token in a cell."""


def for_matplotlib(text: str) -> str:
    """`shown`, of a cell's length, with no formula in it and a box for what the font lacks."""
    font = _font()
    drawn = "".join(c if font.get_char_index(ord(c)) else "□" for c in shown(text, LONGEST))
    return drawn.replace("$", r"\$")


def for_plotly(text: str, longest: int | None = None) -> str:
    """`shown`, with no markup and no formula in it."""
    return _without_markup(shown(text, longest))


def _without_markup(text: str) -> str:
    return html.escape(text).replace("$", "&#36;")


@functools.cache
def _font() -> FT2Font:
    return get_font(findfont("DejaVu Sans"))


def draw(panels: Sequence[Panel]) -> Figure:
    """Heat maps beside each other, one for each panel."""
    layers, positions = panels[0].values.shape
    made, axes = figure(len(panels), width=1.6 + 0.62 * positions, height=1.4 + 0.24 * layers)
    for axis, panel in zip(axes, panels, strict=True):
        image = axis.imshow(panel.values, panel.colours, aspect="auto", origin="lower", norm=Normalize(*panel.limits))
        for (layer, position), value in np.ndenumerate(panel.values):
            # Black or white, whichever reads better on the cell; a cell without a value is white.
            red, green, blue, _ = image.to_rgba(value)
            dark = not np.isnan(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = for_matplotlib(panel.cells[layer][position])
            axis.text(position, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axis.set_xticks(range(positions), [for_matplotlib(t) for t in panel.tokens], rotation=90, fontsize=8)
        axis.set_yticks(range(layers), [str(layer) for layer in panel.layers], fontsize=8)
        axis.set(title=panel.title, xlabel="token read last", ylabel="after block")
        axis.grid(False)
        made.colorbar(image, ax=axis, label=panel.label, fraction=0.04, pad=0.01)
    return made


def plot_comparison(
    found: LensComparison, tokenizer: PreTrainedTokenizerBase, *, last: int | None = None, row: int = 0
) -> Figure:
    """Clean, steered and KL(steered || clean), with the top token's probability as colour, of the `last` tokens of a
    text. For other colours and positions, `draw` what `comparison_panels` gives."""
    held = found.clean.attention_mask[row].nonzero().flatten().tolist()
    return draw(comparison_panels(found, tokenizer, row=row, positions=held[-last:] if last else held))


def interactive(panels: Sequence[Panel]) -> "Interactive":
    """The same for JupyterLab: hold the pointer over a cell for its most probable tokens. Needs plotly."""
    from plotly.subplots import make_subplots

    layers, positions = panels[0].values.shape
    titles = [_without_markup(panel.title) for panel in panels]
    made = make_subplots(1, len(panels), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.08)
    for column, panel in enumerate(panels, start=1):
        right = made.layout[f"xaxis{column if column > 1 else ''}"].domain[1]
        made.add_heatmap(
            z=panel.values.tolist(),
            text=[[for_plotly(cell, LONGEST) for cell in line] for line in panel.cells],
            texttemplate="%{text}",
            hovertext=[["<br>".join(map(_without_markup, lines)) for lines in line] for line in panel.hover],
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale=panel.colours,
            zmin=panel.limits[0],
            zmax=panel.limits[1],
            colorbar={"title": {"text": panel.label, "side": "right"}, "x": right, "thickness": 10},
            row=1,
            col=column,
        )
        ticks = [for_plotly(token, LONGEST) for token in panel.tokens]
        made.update_xaxes(tickvals=list(range(positions)), ticktext=ticks, tickangle=-90, row=1, col=column)
    made.update_yaxes(tickvals=list(range(layers)), ticktext=[str(layer) for layer in panels[0].layers])
    made.update_yaxes(title="after block", col=1)
    made.update_layout(height=160 + 24 * layers, margin={"l": 50, "r": 10, "t": 40, "b": 90}, template="plotly_white")
    return made


def plot_norms(
    axis: Axes, layers: Sequence[int], norms: Mapping[str, Float[Tensor, " layers"]], *, log: bool = False
) -> None:
    """Lengths over layers, a curve for each name (seeds, or the residual stream's own)."""
    for colour, (name, values) in zip(itertools.cycle(COLOURS), norms.items(), strict=False):
        axis.plot(layers, values.numpy(), "o-", color=colour, markersize=3, label=name)
    axis.set(title="Length of the vectors", xlabel="after block", ylabel="norm (units of the residual stream)")
    axis.set_yscale("log" if log else "linear")
    if not log:
        axis.set_ylim(bottom=0)
    axis.legend()


def plot_cosines(axis: Axes, layers: Sequence[int], cosines: Float[Tensor, "layers layers"]) -> None:
    """Cosine between the vectors of every two layers."""
    image = axis.imshow(cosines.numpy(), "RdBu", vmin=-1, vmax=1, origin="lower")
    step = max(1, len(layers) // 10)
    ticks = range(0, len(layers), step)
    axis.set_xticks(ticks, [str(layers[i]) for i in ticks])
    axis.set_yticks(ticks, [str(layers[i]) for i in ticks])
    axis.set(title="Cosine between layers", xlabel="after block", ylabel="after block")
    axis.grid(False)
    axis.figure.colorbar(image, ax=axis, label="cosine", fraction=0.046, pad=0.02)
