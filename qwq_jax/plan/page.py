"""A plan as one self-contained page, written from the same plain values as ``plan.json``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qwq_jax import __version__
from qwq_jax.plan.chips import GB
from qwq_jax.plan.tables import FACTS, fact_text

_STYLE = """
:root{--ink:#1a1f24;--paper:#fff;--pale:#f4f6f8;--dim:#5d6670;--grid:#d5dae0;--a:#2f6fb0;--b:#c8762b;--c:#3b8a5a;
--d:#8a5aa8;--e:#9aa3ad;--bad:#b3261e;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--paper:#14181d;--pale:#1d232a;--dim:#98a2ad;--grid:#38424c;
--a:#6aa9e6;--b:#e5a066;--c:#6fc490;--d:#bd93d8;--e:#78828c;--bad:#ff8f86}}
body{margin:0 auto;padding:24px 16px 64px;max-width:1200px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{margin:0 0 4px;font-size:26px}h2{margin:40px 0 8px;font-size:19px}h3{margin:20px 0 6px;font-size:14px}
p{margin:4px 0 12px;max-width:80ch}.dim{color:var(--dim)}.bad{color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
thead th{border-bottom:1px solid var(--grid)}
.bar{display:flex;height:22px;background:var(--pale);border-radius:4px;overflow:hidden;max-width:900px}
.bar span{height:100%}.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:4px 0 12px}
.key i{display:inline-block;width:10px;height:10px;margin-right:6px}
code{background:var(--pale);padding:1px 5px;border-radius:4px;overflow-wrap:anywhere}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Plan of {{ job }}</title><style>{{ style | safe }}</style></head><body><main>
<h1>Plan of {{ job }}</h1>
<p class="dim">Compiled for these chips by {{ compilers }}; nothing here was run. Times are the least that products,
memory and network allow. Prompts of {{ workload.prompt_tokens }} and completions of {{ workload.completion_tokens }}
tokens on average. Bytes and times are those of one device.</p>
<div class="wide"><table><thead><tr><th scope="col">topology</th><th scope="col">chips</th>
{% for label in columns %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for each in topologies %}<tr><th scope="row">{{ each.topology }}</th><td>{{ each.chips }}</td>
{% if each.fits %}{% for cell in each.cells %}<td>{{ cell }}</td>{% endfor %}
{% else %}<td class="bad" colspan="{{ columns | length }}">does not fit</td>{% endif %}</tr>{% endfor %}
</tbody></table></div>
{% macro bar(pieces) %}
<div class="bar" role="img" aria-label="{% for p in pieces %}{{ p.name }} {{ p.text }}; {% endfor %}">
{% for p in pieces %}<span style="width:{{ p.percent }}%;background:var(--{{ p.colour }})"></span>{% endfor %}</div>
<div class="key">{% for p in pieces %}<span><i style="background:var(--{{ p.colour }})"></i>{{ p.name }}
{{ p.text }}</span>{% endfor %}</div>
{% endmacro %}
{% for each in topologies %}
<h2>{{ each.topology }}</h2>
{% for problem in each.problems %}<p class="bad">{{ problem }}</p>{% endfor %}
{% if each.settings %}<p>With <code>--set {{ each.settings | join(" --set ") }}</code></p>{% endif %}
{% if each.advice %}<p>{{ "Fits" if each.problems else "Faster" }} by estimate:
<code>--set {{ each.advice | join(" --set ") }}</code></p>{% endif %}
{% for phase in each.phases %}<h3>Memory: {{ phase.name }}, {{ phase.total }} of {{ phase.usable }} GB</h3>
{{ bar(phase.pieces) }}{% endfor %}
{% if each.time %}<h3>Time of a step, {{ each.time_total }}</h3>{{ bar(each.time) }}{% endif %}
{% if each.programs %}<div class="wide"><table><thead><tr><th scope="col">program</th><th scope="col">products, ms</th>
<th scope="col">HBM, ms</th><th scope="col">network, ms</th><th scope="col">in all, ms</th><th scope="col">TFLOP</th>
<th scope="col">HBM, GB</th><th scope="col">exchanges</th></tr></thead><tbody>
{% for p in each.programs %}<tr><th scope="row">{{ p.name }}</th>{% for cell in p.cells %}<td>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endif %}
{% endfor %}
<p class="dim">qwq_jax {{ version }}</p></main></body></html>
"""

_COLOURS = "abcde"


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(render(document))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def render(document: Mapping[str, Any]) -> str:
    """The page of a plan's plain values."""
    topologies = [each for plan in document["topologies"] for each in (plan, plan["recommended"]) if each is not None]
    names = [name for name in FACTS if any(name in each["facts"] for each in topologies)]
    return (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        .from_string(_PAGE)
        .render(
            job=document["job"],
            compilers=document["compilers"],
            workload=document["workload"],
            style=_STYLE,
            columns=[FACTS[name] for name in names],
            topologies=[_topology(each, names) for each in topologies],
            version=__version__,
        )
    )


def _topology(each: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    parts = [(f"{part['name']}: {part['program']}", part["seconds"]) for part in each["parts"]]
    total = sum(seconds for _, seconds in parts)
    return {
        **{name: each[name] for name in ("topology", "chips", "fits", "problems", "settings", "advice")},
        "cells": [fact_text(name, each["facts"]) for name in names],
        "phases": list(_phases(each["memory"])) if each["memory"] else [],
        "time": _pieces(parts, total, lambda seconds: _duration(seconds)),
        "time_total": _duration(total),
        "programs": [_program(name, fields) for name, fields in each["programs"].items()],
    }


def _phases(memory: Mapping[str, Any]) -> Any:
    for name, size in memory["phases"].items():
        there = dict(memory["held"])
        if name in ("rollout", "reward", "decode", "prompts"):
            there |= memory["engine"]
        elif memory["gradients"] and name in ("gradient", "update"):
            there["gradients"] = memory["gradients"]
        pieces = [*there.items(), ("temporaries and results", size - sum(there.values()))]
        pieces.append(("free", max(0, memory["usable"] - size)))
        whole = max(memory["usable"], size)
        yield {
            "name": name,
            "total": f"{size / GB:.2f}",
            "usable": f"{memory['usable'] / GB:.2f}",
            "pieces": _pieces(pieces, whole, lambda size: f"{size / GB:.2f} GB"),
        }


def _pieces(parts: Sequence[tuple[str, float]], whole: float, text: Any) -> list[dict[str, Any]]:
    shown = [(name, value) for name, value in parts if value > 0]
    return [
        {
            "name": name,
            "text": text(value),
            "percent": f"{100 * value / whole:.2f}",
            "colour": "pale" if name == "free" else _COLOURS[index % len(_COLOURS)],
        }
        for index, (name, value) in enumerate(shown)
    ]


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:,.2f} ms"
    return f"{seconds:,.1f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _program(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    by_axes: dict[str, int] = {}
    for each in fields["collectives"]:
        by_axes[each["axes"]] = by_axes.get(each["axes"], 0) + each["count"] * each["bytes"]
    exchanges = ", ".join(f"{axes} {size / GB:.3f} GB" for axes, size in by_axes.items()) or "none"
    seconds = fields["seconds"]
    times = ["", "", "", ""]
    if seconds is not None:
        network = seconds["network_waited"] + seconds["network_hidden"]
        times = [f"{1e3 * value:,.2f}" for value in (seconds["compute"], seconds["hbm"], network, seconds["total"])]
    return {
        "name": name,
        "cells": [*times, f"{fields['matrix_flops'] / 1e12:,.3f}", f"{fields['hbm_bytes'] / GB:,.2f}", exchanges],
    }
