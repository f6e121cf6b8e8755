"""A comparison drawn: cosine of two models' directions at each layer, and the transfer matrix as a heat map.

Drawing only, in the style of `cosmic.plots`.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosmic.plots import INK, MINUS, MUTED, PAPER, RULE, SCALE, STYLE, WIDTH, short, write_png
from cosmic.studies.compare import Comparison, EditName, Kind, Source, Which

LINE = "#0069a8"
LEFT, RIGHT, TOP, BOTTOM, TALL = 36.0, 18.0, 46.0, 40.0, 132.0
"""Margins and height of the upper panel's axes, in points."""
LABELS, ROW, HEAD, FOOT = 104.0, 26.0, 82.0, 12.0
"""Width of the matrix's row labels, height of a row, and what is above and below the cells, in points."""

SOURCES: tuple[Source, ...] = ("none", "a", "b", "random")
EDITS: dict[Kind, EditName] = {"harmful": "ablate", "harmless": "add"}


def comparison_figure(comparison: Comparison, width: int | None = None) -> Figure:
    """Cosine per layer, and below it the share refused in each cell of the transfer matrix, if it was measured.

    Args:
        comparison: what `cosmic.studies.compare.compare` returned.
        width: `d_model`; if given, the range is shaded in which 95 % of cosines of random vectors lie.
    """
    upper = TOP + TALL + BOTTOM
    lower = HEAD + ROW * len(SOURCES) + FOOT if comparison.measured else 0.0
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH / 72, (upper + lower) / 72))
        _cosines(figure, comparison, width)
        if comparison.measured:
            _matrix(figure, comparison, upper)
    return figure


def _cosines(figure: Figure, comparison: Comparison, width: int | None) -> None:
    axes = _axes(figure, LEFT, RIGHT, TOP, TALL)
    layers = range(len(comparison.cosines))
    values = [math.nan if value is None else value for value in comparison.cosines]
    axes.set_xlim(-0.5, len(values) - 0.5)
    low = min([0.0, *(value for value in values if value < 0)])
    axes.set_ylim(math.floor(low * 4) / 4 - 0.04, 1.04)
    axes.grid(axis="y")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    if width is not None:
        axes.axhspan(-1.96 / math.sqrt(width), 1.96 / math.sqrt(width), color=RULE, alpha=0.6, linewidth=0)
    axes.plot(layers, values, color=LINE, linewidth=1.9, marker="o", markersize=5 if len(values) <= 40 else 2.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[2.5, 5]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", MINUS))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer", loc="left", labelpad=2)
    shaded = "; grey: 95 % of random pairs" if width is not None else ""
    a, b = short_names(comparison.names, 20)
    _title(axes, LEFT, RIGHT, TALL, "Cosine of the directions, last token", f"{a} and {b}{shaded}")


def _matrix(figure: Figure, comparison: Comparison, top: float) -> None:
    """Rows are directions, columns are models and what is done to them."""
    columns = [(model, kind) for model in comparison.measured for kind in EDITS]
    tall = ROW * len(SOURCES)
    axes = _axes(figure, LABELS, RIGHT, top + HEAD, tall)
    shares = np.array(
        [
            [
                comparison.counts(model, source, "none" if source == "none" else EDITS[kind], kind).share("refused")
                for model, kind in columns
            ]
            for source in SOURCES
        ]
    )
    axes.pcolormesh(shares, vmin=0, vmax=1, cmap=ListedColormap(SCALE), edgecolors=PAPER, linewidth=1.2)
    for row in range(len(SOURCES)):
        for column in range(len(columns)):
            share = shares[row, column]
            colour = PAPER if share > 0.4 else INK
            axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", color=colour, ha="center", va="center")
    a, b = short_names(comparison.names, 14)
    names: dict[Which, str] = {"a": a, "b": b}
    labels: dict[Source, str] = {"none": "no edit", "a": a, "b": b, "random": "random"}
    axes.set_yticks([row + 0.5 for row in range(len(SOURCES))], [labels[source] for source in SOURCES])
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.set_xticks(
        [column + 0.5 for column in range(len(columns))],
        [f"{EDITS[kind]},\n{kind}" for _, kind in columns],
    )
    axes.tick_params(length=0, pad=2)
    for place, model in enumerate(comparison.measured):
        x = (2 * place + 1) / len(columns)
        axes.text(
            x, 1 + 32 / tall, f"on {names[model]}", transform=axes.transAxes, ha="center", color=INK, fontsize=10.5
        )
        if place:
            axes.axvline(2 * place, color=PAPER, linewidth=6)
    axes.spines[:].set_visible(False)
    _title(axes, LABELS, RIGHT, tall, "Refused, %", "whose direction (rows) on which model", lift=36)


def short_names(names: tuple[str, str], width: int) -> tuple[str, str]:
    """The last parts of two paths or Hub ids in at most `width` characters, or A and B where these are the same."""
    first, second = (short(Path(name).name or name, width) for name in names)
    return (first, second) if first != second else ("A", "B")


def _axes(figure: Figure, left: float, right: float, top: float, tall: float) -> Axes:
    """Axes with the given margins in points, `top` from the figure's upper edge."""
    wide, high = (float(size) * 72 for size in figure.get_size_inches())
    return figure.add_axes((left / wide, (high - top - tall) / high, (wide - left - right) / wide, tall / high))


def _title(axes: Axes, left: float, right: float, tall: float, title: str, subtitle: str, lift: float = 0.0) -> None:
    edge = -left / (WIDTH - left - right)
    place = axes.transAxes
    axes.text(edge, 1 + (26 + lift) / tall, title, transform=place, fontsize=11.5, fontweight="bold", color=INK)
    axes.text(edge, 1 + (11 + lift) / tall, subtitle, transform=place, fontsize=10, color=MUTED)


def write_comparison(comparison: Comparison, path: Path, width: int | None = None) -> Path:
    """Draw a comparison into a PNG.

    Args:
        comparison: what `cosmic.studies.compare.compare` returned.
        path: the file to write.
        width: `d_model`, to shade what is chance.

    Returns:
        `path`.

    Raises:
        InputError: the file cannot be written.
    """
    return write_png(comparison_figure(comparison, width), path)
