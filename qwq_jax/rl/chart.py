"""Curves as SVG, drawn here: a few hundred lines of text that need no script, no font and no library to be seen.

Colours are CSS variables, light or dark as the reader prefers, and lines differ by dashes too. The same chart is always
the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Points = tuple[tuple[float, float], ...]
"""Of one run: steps, increasing, and values."""

MOST_POINTS = 400
"""Of a line; more are averaged in groups, since no screen shows them."""

MOST_DOTS = 30
"""Of a line whose points are shown each for itself."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 34
_LETTER = 6.2
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 2")
_LIGHT = ("#0063a6", "#c1460b", "#007a54", "#9a3c7b", "#8a6100", "#3f7fb5")
_DARK = ("#6cb8f0", "#ff9057", "#3fc99a", "#e89ccb", "#f0be4a", "#9fd4ff")

MOST_LINES = len(_LIGHT)
"""Of a chart: more could not be told apart."""

LIGHT_COLOURS = "".join(f"--line-{i}:{colour};" for i, colour in enumerate(_LIGHT)) + "--ink:#1f2328;--grid:#d8dde3;"
DARK_COLOURS = "".join(f"--line-{i}:{colour};" for i, colour in enumerate(_DARK)) + "--ink:#d7dde4;--grid:#3a424b;"
CHART_STYLE = (
    ".chart text{font:11px system-ui,sans-serif;fill:var(--ink)}.chart .title{font-size:13px;font-weight:600}"
    ".chart .grid{stroke:var(--grid);stroke-width:1}.chart polyline{fill:none;stroke-linejoin:round}"
    ".chart .middle{text-anchor:middle}.chart .end{text-anchor:end}"
    + "".join(f".chart .s{i}{{stroke:var(--line-{i})}}.chart .f{i}{{fill:var(--line-{i})}}" for i in range(len(_LIGHT)))
)
"""What the page that charts are put in has to define, beside one of the two sets of colours."""


@dataclass(frozen=True)
class Line:
    """What is measured the same way: one run, or several of other seeds, shown as their mean and the range they fill.

    Attributes:
        label: For the legend.
        runs: The points of each.
    """

    label: str
    runs: tuple[Points, ...]


@dataclass(frozen=True)
class Chart:
    """Values over steps.

    Attributes:
        title: What is measured.
        lines: At most six, told apart by colour and dashes.
        x_label: Under the axis.
        percent: Whether values are shares, to be written in percent.
        smooth: Steps that a mean runs over, drawn over the plain values; 1 shows these alone.
    """

    title: str
    lines: tuple[Line, ...]
    x_label: str = "step"
    percent: bool = False
    smooth: int = 1


def svg(chart: Chart, *, width: int = 448, height: int = 244, standalone: bool = False) -> str:
    """The chart as an SVG element; `standalone` gives it its own colours, for a file of its own."""
    assert len(chart.lines) <= MOST_LINES, "lines beyond the colours cannot be told apart"
    points = [point for line in chart.lines for run in line.runs for point in _finite(run)]
    plot = _Plot.around(points, width, height)
    style = ""
    if standalone:
        dark = f"@media(prefers-color-scheme:dark){{.chart{{{DARK_COLOURS}}}}}"
        style = f"<style>.chart{{{LIGHT_COLOURS}}}{dark}{CHART_STYLE}</style>"
    body = [*_axes(plot, chart), *_legend(chart, width)]
    for index, line in enumerate(chart.lines):
        body += _drawn(plot, line, index, chart)
    if not points:
        body.append(f'<text class="middle" x="{width / 2:.0f}" y="{height / 2:.0f}">no values</text>')
    title = f"<title>{escape(_described(chart))}</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{title}{style}\n' + "\n".join(body) + "\n</svg>"
    )


@dataclass(frozen=True)
class _Plot:
    """Where values lie on the paper, and the ticks of both axes."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], width: int, height: int) -> "_Plot":
        x, y = [at for at, _ in points] or [0.0, 1.0], [value for _, value in points] or [0.0, 1.0]
        x_range, y_ticks = _widened(min(x), max(x)), ticks(*_widened(min(y), max(y)), count=5, outside=True)
        x_ticks = ticks(*x_range, count=6)
        # Half a step means nothing.
        x_ticks = tuple(at for at in x_ticks if at.is_integer()) or x_ticks
        return cls(x_ticks, y_ticks, x_range, (y_ticks[0], y_ticks[-1]), width, height)

    def across(self, at: float) -> float:
        low, high = self.x_range
        return _LEFT + (self.width - _LEFT - _RIGHT) * (at - low) / (high - low)

    def down(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (self.height - _TOP - _BOTTOM) * (value - low) / (high - low)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.across(at):.1f},{self.down(value):.1f}" for at, value in points)


def ticks(low: float, high: float, *, count: int, outside: bool = False) -> tuple[float, ...]:
    """Round numbers from `low` to `high`, some `count` of them; `outside` adds the next beyond each end.

    >>> ticks(0.0, 97.0, count=5)
    (0.0, 20.0, 40.0, 60.0, 80.0)
    >>> ticks(0.31, 0.88, count=5, outside=True)
    (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """
    assert low < high, (low, high)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    if outside:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    else:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Twelve digits hide that 3 x 0.1 is not 0.3.
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def mean_of_runs(runs: Sequence[Points]) -> list[tuple[float, float, float, float]]:
    """By step: the step, and mean, least and greatest value of the runs that have one there."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for at, value in _finite(run):
            values.setdefault(at, []).append(value)
    return [(at, sum(found) / len(found), min(found), max(found)) for at, found in sorted(values.items())]


def running_mean(points: Points, window: int) -> Points:
    """Each value replaced by the mean of the `window` values around it, fewer at the ends."""
    half = window // 2
    values = [value for _, value in points]
    return tuple(
        (at, sum(near) / len(near))
        for i, (at, _) in enumerate(points)
        if (near := values[max(0, i - half) : i + half + 1])
    )


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: the means of groups of neighbours."""
    if len(points) <= most:
        return points
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[first:last] for first, last in pairwise(edges)]
    return tuple((sum(at for at, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups)


def _drawn(plot: _Plot, line: Line, index: int, chart: Chart) -> list[str]:
    """The range of several runs as an area, their mean as a line; of noisy values the plain ones pale behind it."""
    rows = mean_of_runs(line.runs)
    if not rows:
        return []
    mean: Points = tuple((at, value) for at, value, _, _ in rows)
    body = []
    if len(line.runs) > 1:
        lower, upper = (thinned(tuple((row[0], row[column]) for row in rows)) for column in (2, 3))
        area = f"{plot.path(upper)} {plot.path(lower[::-1])}"
        body.append(f'<polygon class="f{index}" fill-opacity=".18" points="{area}"/>')
    smooth = chart.smooth > 1 and len(mean) > 2 * chart.smooth
    if smooth and len(line.runs) == 1:
        body.append(f'<polyline class="s{index}" stroke-opacity=".3" points="{plot.path(thinned(mean))}"/>')
    shown = thinned(running_mean(mean, chart.smooth) if smooth else mean)
    dashes = f' stroke-dasharray="{_DASHES[index]}"' if _DASHES[index] else ""
    body.append(f'<polyline class="s{index}" stroke-width="2"{dashes} points="{plot.path(shown)}"/>')
    if len(mean) <= MOST_DOTS:
        body += [_dot(plot, point, index, f"{line.label}, {chart.x_label}", chart.percent) for point in mean]
    return body


def _dot(plot: _Plot, point: tuple[float, float], index: int, name: str, percent: bool) -> str:
    """A point that names its value when it is pointed at."""
    at, value = point
    place = f'cx="{plot.across(at):.1f}" cy="{plot.down(value):.1f}"'
    text = escape(f"{name} {at:g}: {_number(value, percent)}")
    return f'<circle class="f{index}" {place} r="2.5"><title>{text}</title></circle>'


def _axes(plot: _Plot, chart: Chart) -> list[str]:
    right, bottom = plot.width - _RIGHT, plot.height - _BOTTOM
    body = [f'<text class="title" x="8" y="15">{escape(chart.title)}</text>']
    for value in plot.y_ticks:
        y = plot.down(value)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{_number(value, chart.percent)}</text>')
    for at in plot.x_ticks:
        body.append(f'<text class="middle" x="{plot.across(at):.1f}" y="{bottom + 15}">{at:g}</text>')
    body.append(
        f'<text class="middle" x="{(_LEFT + right) / 2:.0f}" y="{plot.height - 5}">{escape(chart.x_label)}</text>'
    )
    return body


def _legend(chart: Chart, width: int) -> list[str]:
    """Beside the title, from the right, long labels cut to what there is room for; a single line needs none."""
    if len(chart.lines) < 2:
        return []
    room = (width - _RIGHT - 16 - 7.5 * len(chart.title)) / len(chart.lines) - 36
    most = max(3, int(room / _LETTER))
    body, x = [], float(width - _RIGHT)
    for index, line in reversed(list(enumerate(chart.lines))):
        label = line.label if len(line.label) <= most else f"{line.label[: most - 1]}\u2026"
        x -= _LETTER * len(label)
        body.append(f'<text x="{x:.0f}" y="15">{escape(label)}<title>{escape(line.label)}</title></text>')
        dashes = f' stroke-dasharray="{_DASHES[index]}"' if _DASHES[index] else ""
        body.append(
            f'<line class="s{index}" stroke-width="2"{dashes} x1="{x - 26:.0f}" x2="{x - 5:.0f}" y1="11" y2="11"/>'
        )
        x -= 36
    return body


def _described(chart: Chart) -> str:
    """For those who cannot see it: where each line begins and ends."""
    parts = []
    for line in chart.lines:
        rows = mean_of_runs(line.runs)
        if not rows:
            continue
        (begin, first, _, _), (end, last, _, _) = rows[0], rows[-1]
        seeds = f", mean of {len(line.runs)} runs" if len(line.runs) > 1 else ""
        ends = (
            f"{_number(first, chart.percent)} at {chart.x_label} {begin:g}, {_number(last, chart.percent)} at {end:g}"
        )
        parts.append(f"{line.label}{seeds}: {ends}")
    return f"{chart.title}. " + ("; ".join(parts) or "No values.")


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.4g}%" if percent else f"{value:.4g}"


def _finite(run: Points) -> Points:
    return tuple((at, value) for at, value in run if math.isfinite(value))


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range of some width, for values that are all the same too."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * abs(low) or 0.5
    return low - margin, high + margin
