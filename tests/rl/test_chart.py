"""Charts read back from their SVG: points where the values are, ranges, axes, and words for those who cannot see."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from qwq_jax.rl.chart import (
    DARK_COLOURS,
    LIGHT_COLOURS,
    MOST_POINTS,
    Chart,
    Line,
    mean_of_runs,
    running_mean,
    svg,
    thinned,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def parsed(chart, **options):
    return ET.fromstring(svg(chart, **options))


def texts(root):
    return [(e.text or "", float(e.get("x", 0)), float(e.get("y", 0))) for e in root.iter(f"{SVG}text")]


def read_back(root, values_of, *, percent=False):
    """The points of an element in the units of the axes, by the ticks beside them."""
    suffix = "%" if percent else ""
    left = [
        (float(t.removesuffix(suffix)), y - 4) for t, x, y in texts(root) if x < 50 and re.fullmatch(r"[-\d.e%]+", t)
    ]
    height = float(root.get("height", 0))
    below = [(float(t), x) for t, x, y in texts(root) if y == height - 34 + 15]
    down, across = (
        np.polyfit(*zip(*[(y, v) for v, y in left], strict=True), 1),
        np.polyfit(*zip(*[(x, v) for v, x in below], strict=True), 1),
    )
    pairs = [tuple(map(float, pair.split(","))) for pair in values_of.get("points").split()]
    return [(np.polyval(across, x), np.polyval(down, y)) for x, y in pairs]


def test_points_lie_where_their_values_are():
    points = tuple((float(i), 0.1 + 0.07 * i) for i in range(0, 11))
    root = parsed(Chart("reward", (Line("a", (points,)),)))
    (line,) = root.iter(f"{SVG}polyline")
    np.testing.assert_allclose(read_back(root, line), points, atol=0.02)
    assert len(list(root.iter(f"{SVG}circle"))) == 11, "few points are shown each for itself"


def test_shares_are_in_percent():
    points = tuple((float(i), 0.1 * i) for i in range(0, 11))
    root = parsed(Chart("accuracy", (Line("a", (points,)),), percent=True))
    assert {"0%", "20%", "100%"} <= {text for text, _, _ in texts(root)}
    (line,) = root.iter(f"{SVG}polyline")
    np.testing.assert_allclose(read_back(root, line, percent=True), [(x, 100 * y) for x, y in points], atol=1)


def test_several_runs_are_their_mean_and_the_range_they_fill(rng):
    runs = tuple(tuple((float(step), float(v)) for step, v in enumerate(rng.normal(size=50))) for _ in range(3))
    rows = mean_of_runs(runs)
    stacked = np.array([[value for _, value in run] for run in runs])
    np.testing.assert_allclose([row[1] for row in rows], stacked.mean(axis=0))
    np.testing.assert_allclose([row[2] for row in rows], stacked.min(axis=0))
    np.testing.assert_allclose([row[3] for row in rows], stacked.max(axis=0))
    root = parsed(Chart("reward", (Line("a", runs),)))
    (line,), (area,) = root.iter(f"{SVG}polyline"), root.iter(f"{SVG}polygon")
    np.testing.assert_allclose([y for _, y in read_back(root, line)], stacked.mean(axis=0), atol=0.03)
    outline = [y for _, y in read_back(root, area)]
    np.testing.assert_allclose(outline[:50], stacked.max(axis=0), atol=0.03)
    np.testing.assert_allclose(outline[50:], stacked.min(axis=0)[::-1], atol=0.03)


def test_a_run_that_ended_early_leaves_the_mean_to_the_others():
    assert mean_of_runs((((1, 0.0), (2, 2.0)), ((1, 1.0),))) == [(1, 0.5, 0.0, 1.0), (2, 2.0, 2.0, 2.0)]


def test_what_is_no_number_is_left_out():
    points = ((1.0, 0.5), (2.0, math.nan), (3.0, math.inf), (4.0, 0.7))
    root = parsed(Chart("loss", (Line("a", (points,)),)))
    (line,) = root.iter(f"{SVG}polyline")
    np.testing.assert_allclose(read_back(root, line), [(1, 0.5), (4, 0.7)], atol=0.01)


@pytest.mark.parametrize("runs", [(), ((),), (((5.0, 0.25),),), (((1.0, 0.0), (2.0, 0.0)),)])
def test_no_values_one_and_all_the_same_can_be_drawn(runs):
    root = parsed(Chart("x", (Line("a", runs),)))
    for element in root.iter():
        assert "nan" not in str(element.attrib) and "inf" not in str(element.attrib)


def test_a_smooth_line_has_the_plain_values_behind_it(rng):
    points = tuple((float(i), float(v)) for i, v in enumerate(rng.normal(size=100)))
    plain, smooth = parsed(Chart("x", (Line("a", (points,)),), smooth=9)).iter(f"{SVG}polyline")
    assert plain.get("stroke-opacity") and not smooth.get("stroke-opacity")
    averaged = [value for _, value in running_mean(points, 9)]
    np.testing.assert_allclose(averaged[4:-4], np.convolve([v for _, v in points], np.ones(9) / 9, "valid"))


def test_long_runs_are_thinned_to_their_means(rng):
    points = tuple((float(i), float(v)) for i, v in enumerate(rng.normal(size=8 * MOST_POINTS)))
    few = thinned(points)
    assert len(few) == MOST_POINTS
    np.testing.assert_allclose([v for _, v in few], np.array([v for _, v in points]).reshape(-1, 8).mean(axis=1))
    assert len(svg(Chart("x", (Line("a", (points * 1,)),)))) < 20_000


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.88), (-3e-7, 2e-6), (1e9, 3.7e9), (0.9999, 1.0001), (-5, 5)]
)
def test_ticks_are_round_and_cover(low, high):
    found = ticks(low, high, count=5, outside=True)
    steps = np.diff(found)
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high) and 3 <= len(found) <= 12
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"
    inside = ticks(low, high, count=5)
    assert all(low <= value <= high for value in inside) and set(inside) <= set(found)


def test_words_are_escaped_and_say_what_the_lines_do():
    chart = Chart("a < b", (Line("<b>&", (((1.0, 0.5), (9.0, 0.75)),)), Line("none", ())), percent=True)
    root = parsed(chart)
    assert root.get("role") == "img"
    title = root.find(f"{SVG}title")
    assert title is not None and title.text == "a < b. <b>&: 50% at step 1, 75% at 9"
    assert "<b>" not in svg(chart)


def test_a_legend_keeps_clear_of_the_title():
    points = (((1.0, 0.5), (9.0, 0.75)),)
    for names in (["a", "b"], ["arithmetic-1", "arithmetic-2", "arithmetic-3"], ["a rather long name"] * 6):
        root = parsed(Chart("by source", tuple(Line(name, points) for name in names)))
        legend = [(text, x) for text, x, y in texts(root) if y == 15 and text != "by source"]
        assert len(legend) == len(names) and min(x for _, x in legend) - 26 > 8 + 6.5 * len("by source")
        assert all(text == name or text.endswith("\u2026") for (text, _), name in zip(legend, names[::-1], strict=True))
        assert {title.text for title in root.iter(f"{SVG}title")} >= set(names), "the whole name is there to be seen"


def test_a_file_of_its_own_brings_its_colours_and_is_always_the_same():
    chart = Chart("x", (Line("a", (((1.0, 0.5), (9.0, 0.75)),)),))
    assert "prefers-color-scheme:dark" in svg(chart, standalone=True) and "<style>" not in svg(chart)
    assert svg(chart) == svg(chart)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """WCAG 2.2's ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT_COLOURS, "#ffffff"), (DARK_COLOURS, "#14181d")])
def test_colours_can_be_told_from_the_paper(colours, paper):
    named = dict(re.findall(r"--([\w-]+):(#\w{6})", colours))
    assert contrast(named["ink"], paper) >= 7
    lines = [colour for name, colour in named.items() if name.startswith("line")]
    assert len(lines) == 6 and all(contrast(colour, paper) >= 3 for colour in lines)
