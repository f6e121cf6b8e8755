"""Steering curves: what is drawn is what was counted, labels stay apart, and the file is the same each time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from cosmic.errors import InputError
from cosmic.judging import Counts, Verdict
from cosmic.plots import WIDTH
from cosmic.studies.curves import LOOKS, percent, sentence, spread, steering_curves, write_steering_curves
from cosmic.studies.steering import SteeringPoint, Sweep

ALPHAS = (-1.0, 0.0, 0.5, 2.0)
UNEDITED = SteeringPoint(None, Counts(60, 3, 1), Counts(1, 63, 0))
POINTS = [
    SteeringPoint(-1.0, Counts(0, 60, 4), Counts(0, 64, 0)),
    SteeringPoint(0.0, Counts(2, 62, 0), Counts(0, 64, 0)),
    SteeringPoint(0.5, Counts(64, 0, 0), Counts(16, 48, 0)),
    SteeringPoint(2.0, Counts(8, 0, 56), Counts(32, 8, 24)),
]
SWEEP = Sweep(UNEDITED, POINTS, "affine")


def drawn(axes: Axes, verdict: Verdict) -> list[tuple[float, float]]:
    """Points of the curve in a verdict's colour."""
    lines = [line for line in axes.lines if line.get_color() == LOOKS[verdict].line and len(line.get_xdata()) > 1]
    assert len(lines) == 1
    return list(zip(lines[0].get_xdata(), lines[0].get_ydata(), strict=True))


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_curves_go_through_the_shares_and_open_marks_show_the_unedited_model() -> None:
    upper, lower = steering_curves(SWEEP).axes
    assert drawn(upper, "refused") == [(-1, 0), (0, 3.125), (0.5, 100), (2, 12.5)]
    assert drawn(upper, "complied") == [(-1, 93.75), (0, 96.875), (0.5, 0), (2, 0)]
    assert drawn(upper, "unclear") == [(-1, 6.25), (0, 0), (0.5, 0), (2, 87.5)]
    assert drawn(lower, "refused") == [(-1, 0), (0, 0), (0.5, 25), (2, 50)]
    assert drawn(lower, "unclear") == [(-1, 0), (0, 0), (0.5, 0), (2, 37.5)]
    for axes, shares in ((upper, {93.75, 4.6875, 1.5625}), (lower, {1.5625, 0})):
        marks = [line for line in axes.lines if line.get_marker() in "os^" and len(line.get_xdata()) == 1]
        assert {float(line.get_ydata()[0]) for line in marks} == shares
        assert all(line.get_xdata()[0] < -1 for line in marks), "beside the axis of strengths"


def test_bands_are_wilson_intervals() -> None:
    upper = steering_curves(SWEEP).axes[0]
    band = upper.collections[-2]  # the last curve is `refused`, its mark of the unedited model comes after
    low, high = POINTS[3].harmful.interval("refused")
    ends = {round(float(y), 6) for x, y in band.get_paths()[0].vertices if x == 2}
    assert ends == {round(100 * low, 6), round(100 * high, 6)}


@pytest.mark.parametrize(
    "sweep",
    [
        SWEEP,
        Sweep(UNEDITED, POINTS[3:], "affine"),
        Sweep(UNEDITED, [SteeringPoint(a / 4, Counts(0, 0, 64), Counts(0, 0, 64)) for a in range(17)], "affine"),
        Sweep(
            UNEDITED, [SteeringPoint(a / 100, Counts(21, 21, 22), Counts(21, 21, 22)) for a in range(101)], "linear"
        ),
        Sweep(UNEDITED, [SteeringPoint(a, Counts(1, 32, 31), Counts(3, 60, 1)) for a in (-2.5, -1.25, 11)], "linear"),
    ],
)
def test_no_text_covers_another_or_leaves_a_phone(sweep: Sweep) -> None:
    figure = steering_curves(sweep)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    for (one, box), (two, other) in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.95, 0.7).overlaps(other.shrunk(0.95, 0.7)), (one, two)
    assert all(box.x0 >= 0 and 72 * box.x1 / figure.dpi <= WIDTH + 8 for _, box in boxes)


def test_the_picture_says_where_refusal_falls() -> None:
    said = [text.get_text() for text in texts(steering_curves(SWEEP))]
    assert "not monotone: refused 100 → 12.5 % from α = 0.5 to 2" in said
    assert sentence(SWEEP) == (
        "not monotone: refusal of harmful prompts falls from 100 % at α = 0.5 to 12.5 % at α = 2, "
        "where 87.5 % are unclear"
    )
    little = Sweep(
        UNEDITED, [SteeringPoint(a, Counts(6 - int(a), 58, int(a)), UNEDITED.harmless) for a in (-0.0, 1.0)], "affine"
    )
    assert sentence(little).endswith(
        "to 7.8 % at α = 1, where 1.6 % are unclear (within noise: the 95 % intervals overlap)"
    )
    assert "refused falls within noise: 9.4 → 7.8 % from α = 0 to 1" in [
        text.get_text() for text in texts(steering_curves(little))
    ]
    grows = Sweep(UNEDITED, POINTS[:3], "affine")
    assert sentence(grows) == "monotone: refusal of harmful prompts never falls as α grows"
    never = Sweep(UNEDITED, POINTS[:1] * 2, "affine")
    assert sentence(never) == "no harmful prompt is refused at any α"
    assert "none refused at any α" in [text.get_text() for text in texts(steering_curves(never))]
    assert (percent(0), percent(1), percent(0.125), percent(1 / 3)) == ("0", "100", "12.5", "33.3")


@given(places=st.lists(st.floats(0, 128), max_size=4).map(sorted))
def test_labels_are_pushed_apart_and_stay_beside_the_panel(places: list[float]) -> None:
    found = spread(places, 13.0, 128.0)
    assert all(second - first > 12.999 for first, second in itertools.pairwise(found))
    assert all(-0.001 <= place <= 128 for place in found)
    if all(second - first >= 13 for first, second in itertools.pairwise(places)):
        assert found == places


def test_the_file_is_the_same_each_time_and_refused_where_it_cannot_be_written(tmp_path: Path) -> None:
    first = write_steering_curves(SWEEP, tmp_path / "new" / "one.png")
    second = write_steering_curves(SWEEP, tmp_path / "two.png")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_steering_curves(SWEEP, tmp_path / "file" / "x.png")
