"""Every figure's style in one place."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
