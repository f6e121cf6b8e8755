"""Heat maps of candidates' scores, one cell per (token position, layer), the chosen one framed.

Drawing only: nothing is scored or chosen here. Figures are made without pyplot, so no window opens and no state
is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cosmic.extraction import Extraction
from cosmic.storage import replacing

INK, MUTED, RULE, PAPER = "#1d2126", "#5a636e", "#d8dce1", "#ffffff"
FRAME = "#d98200"
MINUS = "\N{MINUS SIGN}"
LEVELS = 24
WIDTH = 328.0
"""Width of one panel in points: a phone's screen, so that type keeps its size there."""

STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}

TITLES = {
    "final": "Final score",
    "comply": "S_comply",
    "refuse": "S_refuse",
    "kl": "KL on harmless (nats)",
    "bypass": "Bypass",
    "induce": "Induce",
}
"""Names of score maps, in the order in which they are drawn."""


def ramp(*stops: str) -> list[str]:
    """`LEVELS` colours from the first stop to the last, as hexadecimal."""
    colours = LinearSegmentedColormap.from_list("ramp", stops, N=LEVELS)
    return [to_hex(colours(level)) for level in range(LEVELS)]


SCALE = ramp("#eff3f7", "#86b6da", "#0069a8", "#08304f")
"""Colours of the cells, from the lowest value to the highest: one hue, told apart by lightness alone."""

KL_FLOOR = 1e-3
ROW_HEIGHT, TOP, BOTTOM, RIGHT = 19.0, 26.0, 34.0, 48.0


@dataclass(frozen=True)
class ScoreMap:
    """One map to draw.

    Attributes:
        values: `[rows, layers]`, not-a-number where there is no score.
        rows: label of each row.
        title: what the values are.
        chosen: (row, layer) of the cell to frame.
        dropped: cells to cross out: candidates that the filters removed.
        logarithmic: whether colours follow the logarithm, as suits a KL divergence.
    """

    values: np.ndarray[Any, np.dtype[np.float64]]
    rows: list[str]
    title: str
    chosen: tuple[int, int] | None = None
    dropped: tuple[tuple[int, int], ...] = ()
    logarithmic: bool = False

    @property
    def limits(self) -> tuple[float, float] | None:
        """Least and greatest finite value, or `None` if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return (float(finite.min()), float(finite.max())) if finite.size else None


def score_maps(
    scores: Mapping[str, Any],
    positions: Sequence[int],
    tokens: Sequence[str],
    chosen: Sequence[int],
    dropped: Sequence[Sequence[int]] = (),
) -> dict[str, ScoreMap]:
    """Maps ready to draw, in the order of `TITLES`.

    Args:
        scores: `[P, L]` each, by name, as lists with `None` for a missing score; unknown names are left out.
        positions: token position of each row, such as -1.
        tokens: token at each position.
        chosen: (index of the position, layer).
        dropped: (index of the position, layer) of the candidates that were filtered out; crossed out in `final` only.
    """
    rows = [
        f"{short(token)} {str(position).replace('-', MINUS)}"
        for position, token in zip(positions, tokens, strict=True)
    ]
    cell = (int(chosen[0]), int(chosen[1]))
    crosses = tuple((int(row), int(layer)) for row, layer, *_ in dropped)
    values = {
        name: np.array([[math.nan if value is None else float(value) for value in row] for row in scores[name]])
        for name in TITLES
        if name in scores
    }
    return {
        name: ScoreMap(
            values[name],
            rows,
            title if np.isfinite(values[name]).all() else f"{title}, blank: not needed",
            cell,
            crosses if name == "final" else (),
            logarithmic=name == "kl",
        )
        for name, title in TITLES.items()
        if name in values
    }


def short(token: str, width: int = 9) -> str:
    """A token in at most `width` characters, with unprintable ones written as escapes."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in token)
    return text if len(text) <= width else text[: width - 1] + "…"


def height(map_: ScoreMap) -> float:
    """Height of a map's panel in points."""
    return TOP + BOTTOM + ROW_HEIGHT * len(map_.rows)


def draw(figure: Figure, map_: ScoreMap, *, top: float, limits: tuple[float, float] | None = None) -> Axes:
    """Draw one map into `figure`, a panel's width wide.

    Args:
        top: distance of the panel's upper edge from the figure's, in points.
        limits: values at the ends of the colour scale, to share it between maps; the map's own by default.
    """
    size = figure.get_size_inches() * 72
    left = 10 + 6.2 * max(map(len, map_.rows))
    tall = ROW_HEIGHT * len(map_.rows)
    below = size[1] - top - TOP - tall
    axes = figure.add_axes((left / size[0], below / size[1], (size[0] - left - RIGHT) / size[0], tall / size[1]))
    norm = _norm(map_, limits or map_.limits or (0.0, 1.0))
    count = map_.values.shape[1]
    cell = (size[0] - left - RIGHT) / count
    values = np.ma.masked_invalid(map_.values)
    axes.pcolormesh(values, norm=norm, cmap=ListedColormap(SCALE), edgecolors=PAPER, linewidth=min(0.7, 0.06 * cell))
    step = max(1, math.ceil(count / 9))
    axes.set_xticks([layer + 0.5 for layer in range(0, count, step)], [str(layer) for layer in range(0, count, step)])
    axes.set_yticks([row + 0.5 for row in range(len(map_.rows))], map_.rows)
    axes.invert_yaxis()
    axes.set_title(map_.title, x=-left / (size[0] - left - RIGHT), pad=8)
    axes.set_xlabel("layer", loc="left", labelpad=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, layer in map_.dropped:
        value = map_.values[row, layer]
        dark = bool(np.isfinite(value)) and float(norm(value)) > 0.5
        axes.plot(
            layer + 0.5,
            row + 0.5,
            "x",
            markersize=min(3.5, 0.6 * cell),
            markeredgewidth=0.8,
            color=PAPER if dark else MUTED,
        )
    if map_.chosen is not None:
        row, layer = map_.chosen
        thick = min(2.4, max(1.2, 0.13 * cell))
        for colour, width in ((PAPER, 2 * thick), (FRAME, thick)):
            axes.add_patch(Rectangle((layer, row), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False))
    _colour_bar(figure, norm, ((size[0] - RIGHT + 8) / size[0], below / size[1], 7 / size[0], tall / size[1]))
    return axes


def _norm(map_: ScoreMap, limits: tuple[float, float]) -> Normalize:
    low, high = limits
    if map_.logarithmic:
        return LogNorm(max(low, KL_FLOOR), max(high, 10 * KL_FLOOR), clip=True)
    return Normalize(low, high if high > low else low + 1e-6)


def _colour_bar(figure: Figure, norm: Normalize, place: tuple[float, float, float, float]) -> None:
    """The scale with its ends labelled; drawn as cells, since matplotlib's own would put a bitmap into an SVG."""
    axes = figure.add_axes(place)
    levels = np.arange(LEVELS, dtype=float)[:, None]
    axes.pcolormesh(levels, cmap=ListedColormap(SCALE), edgecolors="face", linewidth=0.3)
    style = ".1g" if isinstance(norm, LogNorm) else ".2f"
    labels = [f"{end:{style}}".replace("-", MINUS) for end in (norm.vmin, norm.vmax)]
    axes.set_yticks([0, LEVELS], labels)
    low, high = axes.get_yticklabels()
    low.set_verticalalignment("bottom")
    high.set_verticalalignment("top")
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.tick_params(length=0, pad=3, labelsize=10)
    axes.spines[:].set_visible(False)


def heat_maps(maps: Sequence[ScoreMap], *, limits: Sequence[tuple[float, float] | None] | None = None) -> Figure:
    """One figure with `maps` below each other.

    Args:
        maps: what to draw, at least one.
        limits: ends of each map's colour scale; their own by default.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH / 72, sum(map(height, maps)) / 72))
        top = 0.0
        for map_, ends in zip(maps, limits or [None] * len(maps), strict=True):
            draw(figure, map_, top=top, limits=ends)
            top += height(map_)
    return figure


def write_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, trimmed to what is drawn, the same bytes for the same figure.

    Returns:
        `path`.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as temporary, matplotlib.style.context(["default", STYLE]):
        figure.savefig(
            temporary,
            format="png",
            dpi=200,
            facecolor=PAPER,
            bbox_inches="tight",
            pad_inches=0.15,
            metadata={"Software": None},
        )
    return path


def write_heat_maps(extraction: Extraction, path: Path) -> Path:
    """Draw all score maps of an extraction into one PNG; the chosen cell is framed, dropped ones are crossed out.

    Args:
        extraction: what `cosmic.extract` returned.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        InputError: the file cannot be written.
    """
    selection = extraction.selection
    maps = score_maps(
        {name: values.tolist() for name, values in extraction.scores.items()},
        extraction.positions,
        extraction.tokens,
        selection.chosen,
        list(selection.dropped),
    )
    return write_png(heat_maps(list(maps.values())), path)
