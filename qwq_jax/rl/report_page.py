"""The page of a report: its template, in Jinja's language, and its style. What it is filled with is in `report`."""

STYLE = """
:root{$LIGHT--paper:#fff;--pale:#f4f6f8;--dim:#5d6670;--right:#11703a;--wrong:#b3261e;color-scheme:light dark}
@media(prefers-color-scheme:dark){
:root{$DARK--paper:#14181d;--pale:#1d232a;--dim:#98a2ad;--right:#5fd08a;--wrong:#ff8f86}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 64px;max-width:1440px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{margin:0 0 4px;font-size:26px}h2{margin:40px 0 12px;font-size:19px}h3{margin:0 0 8px;font-size:14px}
p{margin:4px 0 12px;max-width:80ch}
.dim{color:var(--dim)}
dl.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
dl.tiles div{background:var(--pale);border-radius:8px;padding:10px 16px}
dl.tiles dt{color:var(--dim);font-size:12px}dl.tiles dd{margin:0;font-weight:600}
.headline dd{font-size:20px}
.charts{display:flex;flex-wrap:wrap;gap:16px}.charts svg{max-width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim);padding-bottom:6px}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;white-space:nowrap}
thead>tr>*{border-bottom:1px solid var(--grid)}tbody+tbody tr:first-child>*{border-top:1px solid var(--grid)}
tbody th{font-weight:600}
.bar{display:inline-block;height:.7em;background:var(--line-0)}
article{margin:0 0 24px;border:1px solid var(--grid);border-radius:8px;overflow:hidden}
article>header{padding:10px 14px;background:var(--pale)}
.pair{display:grid;grid-template-columns:1fr 1fr}
article section{padding:10px 14px;min-width:0}.pair>section+section{border-left:1px solid var(--grid)}
@media(max-width:800px){.pair{grid-template-columns:1fr}
.pair>section+section{border-left:0;border-top:1px solid var(--grid)}}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,monospace;margin:0}
.thought{color:var(--dim);max-height:22em;overflow:auto;border-left:3px solid var(--grid);padding-left:10px;
margin-bottom:8px}
.right{color:var(--right);font-weight:600}.wrong{color:var(--wrong);font-weight:600}
.expected{margin:4px 0 0;font-size:13px}
summary{cursor:pointer}
footer{margin-top:48px;color:var(--dim);font-size:12px}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro tiles(pairs, kind) %}
<dl class="tiles {{ kind }}">
{% for name, value in pairs %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endmacro %}
{% macro shown(reply, when) %}
<section aria-label="reply {{ when }}">
<h3>{{ when }}
{% if reply %}
{% if reply.correct is not none %}
<span class="{{ 'right' if reply.correct else 'wrong' }}">{{ "right" if reply.correct else "wrong" }}</span>
{% endif %}
<span class="dim">reward {{ "%.3g" | format(reply.reward) }} · {{ reply.tokens }} tokens
{%- if reply.truncated %} · cut off{% endif %}{% if reply.note %} · {{ reply.note }}{% endif %}</span>
{% endif %}
</h3>
{% if reply %}
{% if reply.thought %}
<div class="text thought" role="group" tabindex="0" aria-label="thoughts">{{ reply.thought }}</div>
{% endif %}
<div class="text">{{ reply.answer }}</div>
{% else %}
<p class="dim">no reply</p>
{% endif %}
</section>
{% endmacro %}
<main>
<h1>{{ report.title }}</h1>
{% if report.summary %}
<p>{{ report.summary }}</p>
{% endif %}
{% if headline %}
{{ tiles(headline, "headline") }}
{% endif %}
{% if report.facts %}
{{ tiles(report.facts.items(), "") }}
{% endif %}
{% if table %}
<section aria-labelledby="evaluation">
<h2 id="evaluation">Evaluation</h2>
<div class="wide" role="group" tabindex="0" aria-labelledby="evaluation">
<table>
<caption>Means over tasks, in parentheses their 95 % intervals
{%- if columns | length == 3 %}; the gain is over the tasks that both have{% endif %}.</caption>
<thead><tr><th scope="col">source</th><th scope="col">measure</th>
{%- for _, label in columns %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead>
{% for group in table %}
<tbody>
{% for line in group.lines %}
<tr>
{% if loop.first %}
<th scope="rowgroup" rowspan="{{ group.lines | length }}">{{ group.source }}
<br><span class="dim">{{ group.tasks }} tasks x {{ group.samples }}</span></th>
{% endif %}
<td>{{ line[0] }}</td>{% for index, _ in columns %}<td>{{ line[1 + index] }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
</div>
</section>
{% endif %}
{% if charts %}
<section aria-labelledby="curves">
<h2 id="curves">Curves</h2>
<div class="charts">
{% for chart in charts %}
{{ chart | safe }}
{% endfor %}
</div>
<details>
<summary>The curves in numbers</summary>
<div class="wide" role="group" tabindex="0" aria-label="the curves in numbers">
<table>
<thead><tr><th scope="col">run</th><th scope="col">measure</th><th scope="col">first</th><th scope="col">last</th>
<th scope="col">least</th><th scope="col">greatest</th></tr></thead>
<tbody>
{% for row in numbers %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
</section>
{% endif %}
{% if phases %}
<section aria-labelledby="time">
<h2 id="time">Time</h2>
<table>
<thead><tr><th scope="col">phase</th><th scope="col">seconds a step</th><th scope="col">share</th>
<td></td></tr></thead>
<tbody>
{% for phase in phases %}
<tr><th scope="row">{{ phase.name }}</th><td>{{ "%.3g" | format(phase.seconds) }}</td>
<td>{{ "%.1f%%" | format(100 * phase.share) }}</td>
<td><span class="bar" style="width:{{ '%.0f' | format(240 * phase.share) }}px"></span></td></tr>
{% endfor %}
</tbody>
</table>
</section>
{% endif %}
{% if samples %}
<section aria-labelledby="samples">
<h2 id="samples">Replies</h2>
{% for each in samples %}
<article>
<header>
<h3>{{ each.name }} {% if each.source %}<span class="dim">{{ each.source }}</span>{% endif %}</h3>
{% for message in each.messages %}
<div class="text"><span class="dim">{{ message.role }}:</span> {{ message.content }}</div>
{% endfor %}
{% if each.expected %}
<p class="dim expected">expected: {{ each.expected }}</p>
{% endif %}
</header>
<div class="{{ 'pair' if report.labels[0] and report.labels[1] }}">
{% if report.labels[0] %}{{ shown(each.before, report.labels[0]) }}{% endif %}
{% if report.labels[1] %}{{ shown(each.after, report.labels[1]) }}{% endif %}
</div>
</article>
{% endfor %}
</section>
{% endif %}
{% if settings %}
<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
<details>
<summary>Everything the run was told</summary>
<pre class="text">{{ settings }}</pre>
</details>
</section>
{% endif %}
</main>
<footer>qwq_jax {{ version }}</footer>
</body>
</html>
"""
