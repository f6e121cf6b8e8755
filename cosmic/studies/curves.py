"""Refusal against the strength of steering, drawn: one panel for harmful prompts, one for harmless ones.

Drawing only. What is not an answer is drawn too, since a model that has stopped speaking does not comply either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosmic.judging import Counts, Verdict
from cosmic.plots import FRAME, INK, MINUS, MUTED, PAPER, RULE, STYLE, WIDTH, write_png
from cosmic.studies.steering import SteeringPoint, Sweep

PANEL, TOP, BOTTOM, LEFT, RIGHT = 128.0, 50.0, 40.0, 32.0, 92.0
"""Height of a panel's axes and its margins, in points."""

LABEL_PITCH = 13.0
"""Least distance of two labels beside a panel, in points."""


@dataclass(frozen=True)
class Look:
    """How one verdict is drawn; its text is darker than its line, to be read on white."""

    line: str
    text: str
    marker: str
    dashes: tuple[float, ...] = ()


LOOKS: dict[Verdict, Look] = {
    "refused": Look("#0069a8", "#0069a8", "o"),
    "complied": Look(FRAME, "#a05f00", "s", (4, 2)),
    "unclear": Look("#8b939c", MUTED, "^", (1.5, 1.5)),
}


def number(value: float) -> str:
    """A strength as text, with a proper minus."""
    return f"{value:g}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share in per cent: whole ones without a decimal."""
    return f"{100 * share:.1f}".removesuffix(".0")


def sentence(sweep: Sweep) -> str:
    """One line that says whether refusal of harmful prompts grows with α, and where it falls if it does not."""
    fall = sweep.fall
    if _never_refused(sweep):
        return "no harmful prompt is refused at any α"
    if fall is None:
        return "monotone: refusal of harmful prompts never falls as α grows"
    start, end = (
        f"{percent(point.harmful.share('refused'))} % at α = {number(point.alpha or 0.0)}"
        for point in (fall.start, fall.end)
    )
    unclear = fall.end.harmful.share("unclear")
    where = f", where {percent(unclear)} % are unclear" if unclear else ""
    noise = " (within noise: the 95 % intervals overlap)" if fall.within_noise else ""
    return f"not monotone: refusal of harmful prompts falls from {start} to {end}{where}{noise}"


def _never_refused(sweep: Sweep) -> bool:
    return not any(point.harmful.refused for point in sweep.points)


def steering_curves(sweep: Sweep) -> Figure:
    """Shares of replies against α with Wilson 95 % bands; open marks at the left are the unedited model.

    Args:
        sweep: what `cosmic.studies.steering.sweep` returned.
    """
    tall = PANEL + TOP + BOTTOM
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH / 72, 2 * tall / 72))
        _panel(figure, sweep, 0.0, "harmful", ("complied", "unclear", "refused"), _subtitle(sweep))
        _panel(figure, sweep, tall, "harmless", ("unclear", "refused"), "what is not drawn is answered")
    return figure


def _subtitle(sweep: Sweep) -> str:
    fall = sweep.fall
    if len(sweep.points) == 1:
        return f"at one strength, α = {number(sweep.points[0].alpha or 0.0)}"
    if _never_refused(sweep):
        return "none refused at any α"
    if fall is None:
        return "refused never falls as α grows"
    shares = [percent(point.harmful.share("refused")) for point in (fall.start, fall.end)]
    ends = [number(point.alpha or 0.0) for point in (fall.start, fall.end)]
    kind = "refused falls within noise:" if fall.within_noise else "not monotone: refused"
    return f"{kind} {shares[0]} → {shares[1]} % from α = {ends[0]} to {ends[1]}"


def _panel(figure: Figure, sweep: Sweep, top: float, kind: str, verdicts: Sequence[Verdict], subtitle: str) -> None:
    """Title, curves in the given order (the last on top), the unedited model and labels."""
    high = figure.get_size_inches()[1] * 72
    place = (LEFT / WIDTH, (high - top - TOP - PANEL) / high, (WIDTH - LEFT - RIGHT) / WIDTH, PANEL / high)
    axes = figure.add_axes(place)
    alphas = [float(point.alpha or 0.0) for point in sweep.points]
    span = (alphas[-1] - alphas[0]) or 1.0
    aside = alphas[0] - 0.26 * span
    for index, verdict in enumerate(verdicts):
        _curve(axes, alphas, [_counts(point, kind) for point in sweep.points], verdict)
        beside = (index - (len(verdicts) - 1) / 2) * 0.05 * span
        _whisker(axes, aside + beside, _counts(sweep.unedited, kind), verdict, PAPER)
    axes.set_xlim(aside - 0.1 * span, alphas[-1] + 0.03 * span)
    axes.set_ylim(0, 100)
    axes.axvline(alphas[0] - 0.1 * span, color=RULE, linewidth=0.7)
    _ticks(axes, alphas, aside)
    _labels(axes, {verdict: _counts(sweep.points[-1], kind).share(verdict) for verdict in verdicts})
    edge = -LEFT / (WIDTH - LEFT - RIGHT)
    title, across = f"{kind.capitalize()} prompts, % of replies", axes.transAxes
    axes.text(edge, 1 + 30 / PANEL, title, transform=across, fontsize=11.5, fontweight="bold", color=INK)
    axes.text(edge, 1 + 14 / PANEL, subtitle, transform=across, fontsize=10, color=MUTED)


def _counts(point: SteeringPoint, kind: str) -> Counts:
    return point.harmful if kind == "harmful" else point.harmless


def _curve(axes: Axes, alphas: Sequence[float], counts: Sequence[Counts], verdict: Verdict) -> None:
    look = LOOKS[verdict]
    if len(alphas) == 1:  # a band would have no width
        _whisker(axes, alphas[0], counts[0], verdict, look.line)
        return
    low, high = zip(*(found.interval(verdict) for found in counts), strict=True)
    axes.fill_between(
        alphas, [100 * end for end in low], [100 * end for end in high], color=look.line, alpha=0.14, linewidth=0
    )
    axes.plot(
        alphas,
        [100 * found.share(verdict) for found in counts],
        color=look.line,
        linestyle=(0, look.dashes) if look.dashes else "-",
        linewidth=1.9,
        marker=look.marker,
        markersize=5 if len(alphas) <= 21 else 0,
        clip_on=False,
        zorder=3,
    )


def _whisker(axes: Axes, x: float, counts: Counts, verdict: Verdict, fill: str) -> None:
    """One share as a mark with its interval."""
    look, share = LOOKS[verdict], counts.share(verdict)
    low, high = counts.interval(verdict)
    axes.errorbar(
        x,
        100 * share,
        yerr=[[100 * (share - low)], [100 * (high - share)]],
        color=look.line,
        elinewidth=1.2,
        marker=look.marker,
        markersize=6,
        markerfacecolor=fill,
        markeredgewidth=1.4,
        clip_on=False,
        zorder=3,
    )


def _ticks(axes: Axes, alphas: Sequence[float], aside: float) -> None:
    found = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(
        alphas[0], alphas[-1] if len(alphas) > 1 else alphas[0] + 1.0
    )
    inside = [value for value in found if alphas[0] <= value <= alphas[-1]] or [alphas[0]]
    axes.set_xticks([aside, *inside], ["no edit", *map(number, inside)])
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.grid(axis="y")
    axes.tick_params(length=0, pad=6)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("strength α", loc="left", labelpad=2)


def _labels(axes: Axes, shares: dict[Verdict, float]) -> None:
    """Name and last value of each curve beside its end, pushed apart where curves end together."""
    order = sorted(shares, key=lambda verdict: shares[verdict])
    wanted = [PANEL * shares[verdict] for verdict in order]
    for verdict, y in zip(order, spread(wanted, LABEL_PITCH, PANEL), strict=True):
        text = f"{verdict} {percent(shares[verdict])}"
        axes.annotate(
            text,
            (1, y / PANEL),
            (10, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=LOOKS[verdict].text,
            fontsize=10.5,
            annotation_clip=False,
        )


def spread(places: Sequence[float], pitch: float, most: float) -> list[float]:
    """Ascending `places` moved up as little as keeps them `pitch` apart, then down so that none is above `most`."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + pitch) if found else place)
    limit = most
    for index in reversed(range(len(found))):
        found[index] = min(found[index], limit)
        limit = found[index] - pitch
    return found


def write_steering_curves(sweep: Sweep, path: Path) -> Path:
    """Draw a sweep into a PNG.

    Args:
        sweep: what `cosmic.studies.steering.sweep` returned.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        InputError: the file cannot be written.
    """
    return write_png(steering_curves(sweep), path)
