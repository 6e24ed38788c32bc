"""A run as one HTML file: the result, the curves, and what the model said before and after.

The page needs nothing but itself: no script, no network, no font. Everything that a model, a task or a config says is
escaped by the template, and the page forbids scripts besides. The same report is always the same bytes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qwq_jax import __version__
from qwq_jax.chat import checked_message
from qwq_jax.rl.chart import CHART_STYLE, DARK_COLOURS, LIGHT_COLOURS, MOST_LINES, Chart, Line, svg
from qwq_jax.rl.evaluate import Estimate, Evaluation, Row
from qwq_jax.rl.measures import HELD_OUT, MEASURES, Form, Measure, mean_phases
from qwq_jax.rl.report_page import PAGE, STYLE
from qwq_jax.rl.types import Task

Records = Sequence[Mapping[str, float]]
"""What a ``metrics.jsonl`` holds; see `train.metrics.read_records`."""


@dataclass(frozen=True)
class Curves:
    """What is drawn as one line: the records of one run, or of several that differ in their seed alone."""

    label: str
    runs: tuple[Records, ...]


@dataclass(frozen=True)
class ShownReply:
    """A reply and what became of it.

    Attributes:
        thought: None where there is none.
        answer: What follows the thoughts.
        reward: The reward.
        correct: Whether it solves the task; None where nobody judged that.
        tokens: Its length.
        truncated: Whether it was cut off.
        note: Why it was judged so.
    """

    thought: str | None
    answer: str
    reward: float
    correct: bool | None = None
    tokens: int = 0
    truncated: bool = False
    note: str = ""


@dataclass(frozen=True)
class ShownTask:
    """A task with a reply from before the training, and one from after it."""

    task: Task
    before: ShownReply | None
    after: ShownReply | None


@dataclass(frozen=True)
class Results:
    """The evaluations of a run; the gains are those of `evaluate.compare`."""

    before: Evaluation | None = None
    after: Evaluation | None = None
    gains: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: Of the page.
        summary: A sentence or two below it.
        facts: What else is to be known at a glance, such as ``{"model": "tiny-reasoner", "time": "6:12"}``.
        curves: At most six lines in each chart.
        results: The table.
        samples: The replies, in this order.
        config: The settings of the run, nested as in its TOML file.
        labels: What the two sides of `results` and `samples` are called; one that is empty is not shown.
    """

    title: str
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    curves: tuple[Curves, ...] = ()
    results: Results = Results()
    samples: tuple[ShownTask, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, str] = ("before", "after")


def write_report(path: Path, report: Report) -> None:
    """Writes the page, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8", errors="replace") as file:
        file.write(render_report(report))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def render_report(report: Report) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        report=report,
        style=STYLE.replace("$LIGHT", LIGHT_COLOURS).replace("$DARK", DARK_COLOURS) + CHART_STYLE,
        headline=_headline(report.results, report.labels),
        columns=_columns(report.results, report.labels),
        table=list(_table(report.results)),
        charts=[svg(chart) for chart in charts(report.curves)],
        numbers=list(_numbers(report.curves)),
        phases=_phases(report.curves),
        samples=[_sample(each) for each in report.samples],
        settings="\n".join(_settings(report.config)),
        version=__version__,
    )
    # Control characters, which a model may write, are no part of HTML.
    return page.translate({code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), 127)})


def charts(curves: Sequence[Curves]) -> list[Chart]:
    """One chart for each measure that a run has, and one of the accuracy by source."""
    found = []
    for measure in MEASURES:
        lines = [Line(each.label, tuple(_points(measure, records) for records in each.runs)) for each in curves]
        found += _chart(measure.label, lines, percent=measure.form is Form.SHARE)
        if measure.label == HELD_OUT.label:
            found += [chart for each in curves for chart in _by_source(each, alone=len(curves) == 1)]
    return found


def _by_source(curves: Curves, *, alone: bool) -> list[Chart]:
    """The held-out accuracy of each source, if there are several, but no more than can be told apart."""
    prefix = f"{HELD_OUT.names[0]}/"
    sources = sorted({name for run in curves.runs for record in run for name in record if name.startswith(prefix)})
    if not 1 < len(sources) <= MOST_LINES:
        return []
    lines = [
        Line(source.removeprefix(prefix), tuple(_points(Measure("", (source,)), records) for records in curves.runs))
        for source in sources
    ]
    return _chart("by source" if alone else f"{curves.label} by source", lines, percent=True)


def _chart(title: str, lines: Sequence[Line], *, percent: bool) -> list[Chart]:
    """A chart of the lines that have values, if any has; smooth in proportion to their length."""
    lines = [line for line in lines if any(line.runs)]
    if not lines:
        return []
    longest = max(len(run) for line in lines for run in line.runs)
    return [Chart(title, tuple(lines), percent=percent, smooth=1 + 2 * (longest // 50))]


def write_chart(path: Path, chart: Chart, *, width: int = 640, height: int = 320) -> None:
    """Writes a chart as an SVG file of its own, light or dark as its reader prefers."""
    path.write_text(svg(chart, width=width, height=height, standalone=True) + "\n", encoding="utf-8")


def estimate_text(estimate: Estimate | None, *, share: bool, signed: bool = False) -> str:
    """An estimate with its interval, for people.

    >>> estimate_text(Estimate(0.875, 0.8, 0.93), share=True)
    '87.5% (80.0 to 93.0)'
    """
    if estimate is None:
        return ""
    form = ("+" if signed else "") + (".1f" if share else ".3f")
    scale, unit = (100, "%" if not signed else " points") if share else (1, "")
    text = f"{scale * estimate.value:{form}}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({scale * estimate.low:{form}} to {scale * estimate.high:{form}})"


def _points(measure: Measure, records: Records) -> tuple[tuple[float, float], ...]:
    values = ((record["step"], measure.of(record)) for record in records)
    return tuple((float(step), value) for step, value in values if value is not None)


def _headline(results: Results, labels: tuple[str, str]) -> list[tuple[str, str]]:
    """The accuracy before and after, and the gain; of what there is."""
    found = []
    for label, evaluation in zip(labels, (results.before, results.after), strict=True):
        for name, estimate in evaluation.total.measures.items() if evaluation else ():
            if name.startswith("avg@"):
                found.append((f"{name} {label}", estimate_text(estimate, share=True)))
    for name, estimate in next(iter(results.gains.values()), {}).items():
        if name.startswith("avg@"):
            found.append(("gain", estimate_text(estimate, share=True, signed=True)))
    return found


def _columns(results: Results, labels: tuple[str, str]) -> list[tuple[int, str]]:
    """Which of the three values of a line are shown, and what they are called."""
    there = (results.before is not None, results.after is not None, bool(results.gains))
    return [(index, label) for index, label in enumerate((*labels, "gain")) if there[index]]


def _table(results: Results) -> Iterator[dict[str, Any]]:
    """A group of rows for each source: name, tasks, and its measures before, after and by how much they differ."""
    evaluations = [evaluation for evaluation in (results.before, results.after) if evaluation]
    names = dict.fromkeys(row.source for evaluation in evaluations for row in evaluation.rows)
    for source in names:
        before, after = (_row_of(evaluation, source) for evaluation in (results.before, results.after))
        row = after or before
        assert row is not None, "a source comes from one of the two"
        measures = dict.fromkeys([*(before.measures if before else ()), *(after.measures if after else ())])
        gains = results.gains.get(source, {})
        lines = [
            [
                name,
                estimate_text(before.measures.get(name) if before else None, share=name != "reward"),
                estimate_text(after.measures.get(name) if after else None, share=name != "reward"),
                estimate_text(gains.get(name), share=name != "reward", signed=True),
            ]
            for name in measures
        ]
        lines.append(["tokens", *(f"{each.tokens:,.0f}" if each else "" for each in (before, after)), ""])
        lines.append(["truncated", *(f"{each.truncated:.1%}" if each else "" for each in (before, after)), ""])
        yield {"source": source, "tasks": row.tasks, "samples": row.samples, "lines": lines}


def _row_of(evaluation: Evaluation | None, source: str) -> Row | None:
    return next((row for row in evaluation.rows if row.source == source), None) if evaluation else None


def _numbers(curves: Sequence[Curves]) -> Iterator[list[str]]:
    """For those who cannot see the charts: label, measure, and its first, last, least and greatest value."""
    for each in curves:
        for measure in MEASURES:
            runs = [points for records in each.runs if (points := _points(measure, records))]
            values = [value for points in runs for _, value in points]
            if values:
                first, last = (sum(points[end][1] for points in runs) / len(runs) for end in (0, -1))
                yield [each.label, measure.label, *map(measure.written, (first, last, min(values), max(values)))]


def _phases(curves: Sequence[Curves]) -> list[dict[str, Any]]:
    """Mean seconds a step of each phase, and its part of them all, over all runs."""
    means = mean_phases(record for each in curves for run in each.runs for record in run)
    whole = sum(means.values()) or 1.0
    return [{"name": phase, "seconds": seconds, "share": seconds / whole} for phase, seconds in means.items()]


def _sample(shown: ShownTask) -> dict[str, Any]:
    messages = [checked_message(message, index) for index, message in enumerate(shown.task.messages)]
    return {
        "name": shown.task.task_id,
        "source": shown.task.source,
        "messages": [{"role": message["role"], "content": message.get("content", "")} for message in messages],
        "expected": shown.task.judge.get("answer"),
        "before": shown.before,
        "after": shown.after,
    }


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line a setting, by its path as `--set` takes it."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            text = repr(value) if isinstance(value, float) and not math.isfinite(value) else _json(value)
            yield f"{prefix}{name} = {text}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
