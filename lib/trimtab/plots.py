"""Every figure's style in one place."""

import json
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Interactive

# Okabe and Ito's palette: told apart by colour-blind readers, and in this order by everybody.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000"]


def figure(columns: int = 1, *, width: float = 5.4, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A row of axes in the house style; sizes in inches for each."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
        }
    )
    made, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    plt.close(made)  # a notebook shows the figure it returns; without this it would show it twice
    return made, list(axes[0])


def interactive(columns: int = 1, *, height: int = 340) -> "Interactive":
    """The same for JupyterLab; height in pixels. Needs plotly."""
    from plotly.subplots import make_subplots

    made = make_subplots(1, columns)
    made.update_layout(template="plotly_white", colorway=COLOURS, height=height)
    made.update_layout(margin={"l": 60, "r": 10, "t": 30, "b": 50}, showlegend=True)
    return made


def as_outputs(made: "Interactive") -> tuple[dict[str, Any], ...]:
    """A plotly figure as the `outputs` of a `widgets.Output`: what is shown follows a widget, the figure is none."""
    data = {"application/vnd.plotly.v1+json": json.loads(made.to_json())}
    return ({"output_type": "display_data", "metadata": {}, "data": data},)
