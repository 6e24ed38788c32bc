"""The page as a reader's browser takes it: complete, escaped, and in need of nothing else."""

import re
from html.parser import HTMLParser

import pytest

from qwq_jax.rl.evaluate import JudgedTask, Sample, compare, evaluate
from qwq_jax.rl.report import (
    Curves,
    Report,
    Results,
    ShownReply,
    ShownTask,
    charts,
    render_report,
    write_chart,
    write_report,
)
from qwq_jax.rl.types import Task
from tests.rl.test_chart import contrast

EVIL = "</div></script><script>alert('x')</script><img src=x onerror=alert(1)>&lt;\"'`{{ 7 * 7 }}{% raw %}"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What is where; fails where a tag is closed that is not the open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.ids = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all_of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return "".join(data for _, data in self.texts)


def judged(share, samples=4, votes=True):
    marks = [i < share for i in range(samples)]
    return tuple(Sample(float(m), m, "1" if m else "2", 50) for m in marks)


def results():
    before = [JudgedTask(str(i), f"s{i % 2}", judged(2), True) for i in range(20)]
    after = [JudgedTask(str(i), f"s{i % 2}", judged(3), True) for i in range(20)]
    return Results(evaluate(before, [1, 4]), evaluate(after, [1, 4]), compare(before, after, [1, 4]))


RECORDS = [
    {"step": step, "reward": 0.1 * step, "clip_low": 0.01, "clip_high": 0.02, "seconds_rollout": 3.0, "seconds_save": 1}
    for step in range(1, 9)
]


def full():
    task = Task("t-1", ({"role": "user", "content": "6 x 7?"},), "sums", {"answer": "42"})
    before = ShownReply("six times six", "It is 36.", 0.0, False, 12, note="36 is not 42")
    after = ShownReply("six times seven", "It is 42.", 1.0, True, 9, truncated=True)
    return Report(
        "A run",
        "It went well.",
        {"model": "tiny"},
        (Curves("grpo", (RECORDS, RECORDS[:5])), Curves("flipped", (RECORDS,))),
        results(),
        (ShownTask(task, before, after),),
        {"model": "x", "optimizer": {"learning_rate": 1e-5}, "bound": float("inf"), "tasks": [{"kind": "arithmetic"}]},
    )


def test_the_page_holds_all_that_it_is_given():
    page = Page(render_report(full()))
    for part in (
        "A run", "It went well.", "tiny", "t-1", "6 x 7?", "expected: 42", "six times six", "It is 36.", "36 is not 42",
        "six times seven", "It is 42.", "cut off", "optimizer.learning_rate = 1e-05",
        'tasks = [{"kind": "arithmetic"}]',
        "bound = inf", "20 tasks x 4", "avg@4", "pass@1", "maj@4",
    ):  # fmt: skip
        assert part in page.text, part
    assert [data for tag, data in page.texts if tag == "h2"] == [
        "Evaluation", "Curves", "Time", "Replies", "Settings",
    ]  # fmt: skip
    assert page.text.index("six times six") < page.text.index("six times seven"), "before is on the left"
    dimmed = [attributes for attributes in page.all_of("div") if "thought" in (attributes.get("class") or "")]
    assert len(dimmed) == 2


def test_the_table_has_intervals_and_gains():
    text = render_report(full())
    (row,) = re.findall(r"<td>avg@4</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", text)[:1]
    assert row[0].startswith("50.0% (") and row[1].startswith("75.0% (") and row[2].startswith("+25.0 points (+")
    assert [source for source in re.findall(r'rowspan="\d+">(\w+)', text)] == ["all", "s0", "s1"]


def test_it_needs_nothing_from_outside_and_runs_nothing():
    text = render_report(full())
    page = Page(text)
    assert not page.all_of("script") and not page.all_of("link") and not page.all_of("img")
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags for name in attrs)
    assert set(re.findall(r"\w+://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "url(" not in text and "@import" not in text
    (policy,) = [meta["content"] for meta in page.all_of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_whatever_is_said_is_text():
    reply = ShownReply(EVIL, EVIL, 0.0, note=EVIL)
    task = Task(EVIL, ({"role": "user", "content": [{"type": "text", "text": EVIL}]},), EVIL, {"answer": EVIL})
    records = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0}]
    evaluation = evaluate([JudgedTask("1", EVIL, judged(1)), JudgedTask("2", "b", judged(2))], [1])
    report = Report(
        EVIL, EVIL, {EVIL: EVIL}, (Curves(EVIL, (records,)), Curves("b", (records,))), Results(None, evaluation),
        (ShownTask(task, reply, reply),), {EVIL: EVIL, "list": [EVIL]},
    )  # fmt: skip
    page = Page(render_report(report))
    assert not page.all_of("script") and not page.all_of("img")
    # Title and h1, summary, a tile's name and value, legend, description and dots of a chart, table, ...
    assert page.text.count(EVIL) >= 15
    assert "49" not in re.findall(r"\b49\b", page.text), "the template is not rendered twice"


def test_control_characters_of_a_model_are_replaced():
    reply = ShownReply(None, "a\x00b\x1b[31m\tc\nd", 0.0)
    text = render_report(Report("x", samples=(ShownTask(Task("1", ({"role": "user", "content": "?"},)), reply, None),)))
    assert "a\ufffdb\ufffd[31m\tc\nd" in text and "\x00" not in text and "no reply" in text


def test_an_empty_report_is_a_page_without_sections():
    page = Page(render_report(Report("Nothing yet")))
    assert not page.all_of("h2") and "Nothing yet" in page.text


@pytest.mark.parametrize("missing", ["before", "after"])
def test_one_evaluation_is_enough(missing):
    both = results()
    one = Results(None, both.after) if missing == "before" else Results(both.before, None)
    page = Page(render_report(Report("x", results=one)))
    assert "gain" not in page.text and len(page.all_of("th")) == 2 + 1 + 3, "no empty columns"
    assert ("avg@4 after" in page.text) is (missing == "before")
    assert ("avg@4 before" in page.text) is (missing == "after")


def test_sides_may_have_other_names_or_be_one():
    shown = ShownTask(Task("1", ({"role": "user", "content": "?"},)), ShownReply(None, "old", 0.0), None)
    page = Page(render_report(Report("x", samples=(shown,), labels=("step 3", "step 9"))))
    assert [attributes.get("aria-label") for attributes in page.all_of("section")][1:] == [
        "reply step 3",
        "reply step 9",
    ]
    page = Page(render_report(Report("x", samples=(shown,), labels=("now", ""))))
    assert [attributes.get("aria-label") for attributes in page.all_of("section")][1:] == ["reply now"]


def test_the_same_report_is_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    write_report(first, full())
    write_report(second, full())
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_charts_are_of_the_measures_that_the_runs_have():
    found = {chart.title: chart for chart in charts(full().curves)}
    assert list(found) == ["reward", "clipped"]
    assert [line.label for line in found["reward"].lines] == ["grpo", "flipped"]
    assert found["reward"].lines[0].runs[1][-1] == (5.0, 0.5)
    assert found["clipped"].percent and found["clipped"].lines[0].runs[0][0] == (1.0, pytest.approx(0.03))


def test_accuracy_by_source_is_a_chart_where_there_are_several():
    records = [{"step": s, "eval_accuracy": 0.5, "eval_accuracy/a": 0.1 * s, "eval_accuracy/b": 0.9} for s in (0, 5)]
    both = charts((Curves("grpo", (records,)),))
    assert [chart.title for chart in both] == ["held-out accuracy", "by source"]
    assert [line.label for line in both[1].lines] == ["a", "b"] and both[1].percent
    assert both[1].lines[0].runs == (((0.0, 0.0), (5.0, 0.5)),)
    two = charts((Curves("grpo", (records,)), Curves("dapo", (records,))))
    assert [chart.title for chart in two] == ["held-out accuracy", "grpo by source", "dapo by source"]
    many = [{"step": 1, "eval_accuracy": 0.5} | {f"eval_accuracy/{i}": 0.5 for i in range(7)}]
    assert [chart.title for chart in charts((Curves("grpo", (many,)),))] == ["held-out accuracy"]
    assert [chart.title for chart in charts((Curves("x", ([{"step": 1, "eval_accuracy/a": 0.5}],)),))] == []


def test_times_of_the_phases_add_up():
    page = Page(render_report(full()))
    assert "75.0%" in page.text and "25.0%" in page.text


def test_a_chart_can_be_a_file(tmp_path):
    write_chart(tmp_path / "reward.svg", charts(full().curves)[0])
    assert (tmp_path / "reward.svg").read_text().startswith("<svg xmlns=")


def test_it_can_be_read_with_other_senses():
    """Language, headings, names of charts and tables, and text that stands out from the paper, light and dark."""
    text = render_report(full())
    page = Page(text)
    assert page.all_of("html")[0]["lang"] == "en" and len(page.all_of("h1")) == 1
    assert all(attributes.get("role") == "img" for attributes in page.all_of("svg"))
    assert text.count("<title>") >= 1 + len(page.all_of("svg"))
    assert all(attributes.get("scope") for attributes in page.all_of("th") if "aria-hidden" not in attributes)
    light, dark = (dict(re.findall(r"--(paper|dim|right|wrong|pale|ink):(#\w{6}|#fff)\b", part))
                   for part in text.split("@media(prefers-color-scheme:dark)")[:2])  # fmt: skip
    for colours in (light, dark):
        paper = "#ffffff" if colours["paper"] == "#fff" else colours["paper"]
        assert all(contrast(colours[name], paper) >= 4.5 for name in ("ink", "dim", "right", "wrong"))
        assert contrast(colours["ink"], colours["pale"]) >= 4.5 and contrast(colours["dim"], colours["pale"]) >= 4.5
