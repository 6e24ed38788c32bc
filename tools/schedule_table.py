"""The table of `kernel_schedule`: our kernels with the tiles they ship with, against the best of others."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_schedule import CHIPS, Request, measure
from schedule_paged import KINDS
from schedule_report import binding, hottest, seconds_of_memory

from qwq_jax.kernels.attention.blocks import tile_sizes

LENGTHS = (8192, 32768)
# The best of a search over blocks of 256 to 4096 that compile, on v5e and v6e; on other chips those of the nearest one.
# Forward: block_q, block_kv, block_kv_compute. Backward: the same for dk and dv, then block_q and block_kv for dq.
BEST: dict[tuple[str, str, int], dict[str, tuple[int, ...]]] = {
    ("forward", "splash", 8192): {"v5e": (2048, 2048, 256), "v6e": (2048, 2048, 512), "v4": (1024, 1024, 256)},
    ("forward", "splash", 32768): {
        "v5e": (2048, 2048, 256),
        "v6e": (4096, 4096, 512),
        "v4": (1024, 1024, 256),
        "tpu7x": (2048, 2048, 512),
    },
    ("forward", "tokamax", 8192): {"v5e": (2048, 2048, 256), "v6e": (2048, 2048, 1024)},
    ("forward", "tokamax", 32768): {"v5e": (2048, 2048, 256), "v6e": (2048, 2048, 1024)},
    ("backward", "splash", 8192): {"v5e": (1024, 1024, 512, 1024, 1024), "v6e": (2048, 1024, 512, 1024, 2048)},
    ("backward", "splash", 32768): {
        "v5e": (2048, 2048, 512, 2048, 2048),
        "v6e": (2048, 2048, 1024, 2048, 2048),
        "v4": (1024, 1024, 512, 1024, 1024),
    },
    ("backward", "splash_fused", 8192): {"v5e": (1024, 1024, 1024), "v6e": (1024, 1024, 1024)},
    ("backward", "splash_fused", 32768): {
        "v5e": (2048, 2048, 512),
        "v6e": (2048, 2048, 1024),
        "v4": (1024, 1024, 1024),
    },
}
NEAREST = {"v4": "v5e", "v5p": "v5e", "tpu7x": "v6e"}
DECODE = {"ragged": {4096: (16, 16), 8192: (16, 16), 32768: (32, 16)}}
# Our decode, by the type of the cache: tokens a page on each chip; the rest of its sizes are those it ships with.
PAGES = {
    "ours": {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 128, "tpu7x": 256},
    "ours_int8": {"v4": 256, "v5e": 256, "v5p": 256, "v6e": 512},
    "ours_float8": {"tpu7x": 512},
}


@dataclass(frozen=True)
class Entry:
    """A line of the table: what was asked for and what came of it."""

    request: Request
    result: dict[str, Any]

    @property
    def cycles(self) -> int | None:
        """Of all kernels of the call."""
        return self.result.get("cycles")


def requests() -> Iterator[Request]:
    """All measurements of the table."""
    for kind in ("forward", "backward"):
        peers = [kernel for which, kernel, tokens in BEST if which == kind and tokens == LENGTHS[0]]
        for tokens in LENGTHS:
            for chip in CHIPS:
                tiles = tile_sizes(kind, KINDS[chip], groups=5, length=tokens)
                yield Request(chip, kind, "ours", tokens, (*tiles[:3], *[1] * tiles.looped))
                for peer in peers:
                    best = BEST[kind, peer, tokens]
                    yield Request(chip, kind, peer, tokens, best.get(chip) or best[NEAREST[chip]])
    for kernel, lengths in DECODE.items():
        for tokens, sizes in lengths.items():
            for chip in CHIPS:
                yield Request(chip, "decode", kernel, tokens, sizes)
    for kernel, pages in PAGES.items():
        for tokens in DECODE["ragged"]:
            for chip, page in pages.items():
                yield Request(chip, "decode", kernel, tokens, (page,))


def collect(cache: Path | None) -> list[Entry]:
    """Measures all, one after the other."""
    entries = []
    for request in requests():
        entries.append(Entry(request, measure(request, cache=cache)))
        print(request, entries[-1].cycles or entries[-1].result["error"].splitlines()[0][:200], flush=True)
    return entries


def line(entry: Entry, ours: Entry | None) -> str:
    """A row of a markdown table."""
    request, result = entry.request, entry.result
    sizes = ", ".join(map(str, request.sizes))
    cells = [request.chip, f"{request.tokens:,}", request.kernel, sizes]
    if "error" in result:
        reason = "not installed" if "is not installed" in result["error"] else "does not compile"
        return f"| {' | '.join(cells)} | {reason} | | | | | | |"
    hot, chip = hottest(result), CHIPS[request.chip]
    spills = (hot["used"].get("VLOAD:FILL", 0) + hot["used"].get("VSTORE:SPILL", 0)) / hot["bundles"]
    ratio = f"{ours.cycles / result['cycles']:.2f}" if ours and ours.cycles and ours is not entry else ""
    cells += [
        f"{result['cycles']:,}",
        f"{result['cycles'] / chip.ghz / 1e3:,.0f}",
        f"{seconds_of_memory(request, result) * 1e6:,.0f} ({result['moved'] / result['ideal']:.1f}x)",
        f"{result['temporary'] / 1e6:,.0f}",
        binding(hot["load"]),
        f"{spills:.2f}",
        ratio,
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| chip | tokens | kernel | tiles | cycles | µs | HBM µs (bytes over ideal) | XLA temporaries, MB |"
    " busiest units, hot region | fills and spills a cycle | ours / this |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
INTRODUCTION = """# Attention kernels by the compiler's schedule

**Nothing here was timed on a chip.** Every figure is from the static schedule that libtpu's compiler makes for a real
TPU, on a machine without one. To make it again:

    pip install libtpu && pip install --no-deps tokamax
    python tools/kernel_schedule.py table --write docs/benchmarks/kernels.md

One row of T tokens, causal, 5 query heads of 128 over one kv head, bf16: QwQ-32B on 8 chips. Queries come scaled, as
splash demands, and the forward returns no residuals. A cycle is a bundle of the schedule with the waits that the
compiler counts on; how often each region runs follows from the lists of visits that the kernels are given. Both cores
of v4 and v5p are added up (how well a kernel shares its work between them is not in the ratios).

Waits for memory are not in it: the time that the blocks' bytes take at full bandwidth stands beside it; where it is
the larger one, as in decode on v5e, memory binds. XLA operations around the kernels are left out: `di = sum(d_out *
out)`, the same for all, and for `splash_fused` also the sum over its parts of dq, the temporary that grows with the
square of the length.

Our tiles are those of `qwq_jax/kernels/attention/blocks.py` (decode: `paged_blocks.py` beside it), searched on v5e and
v6e like the peers', on powers of two and not exhaustively:

- splash forward, 8k: 28 sizes on v5e and 14 on v6e, blocks of 512 to 4096; 32k: 5 and 4; on v4 4, at 8k;
- splash backward, 8k: fused 8 and 7 sizes, two kernels 5 and 4, blocks of 512 to 2048; on v4 two of each, 8k; fused at
  32k 2 on v5e and 1 on v6e, the two kernels at 32k one;
- tokamax forward, 8k: 3 and 3 sizes, carried over to 32k; its experimental scheduler was slower in the one size tried;
- ragged paged attention of jax: one size a length, not searched; v5p and tpu7x (and v4 where not named): sizes of the
  nearest chip. Its cycles are those of its blocks in a list, and its bytes those it fetches.

A fourth number, 1, of our tiles: chunks that are visible throughout come one after another, not as many as there are at
once; the kernel compiles in a third of the time.

In decode, 16 rows of T tokens each take one token more: µs beside HBM µs say which of the two binds. `tiles` of ours is
the tokens a page; `ours_int8` and `ours_float8` are 8-bit caches, with their scales.

So a ratio is against the best found, and the less was searched the kinder it is to us. Tokamax's backward is missing.
The two chips and lengths that tiles were chosen on are also those of the table. `splash` backward is its two kernels.

Clocks: v4 1.05, v5e 1.5 and v5p 1.75 GHz follow from their bf16 peak; v6e 1.75 GHz is an assumption, and 2.2 GHz for a
core of tpu7x follows from it by the ratio of the peaks. Ratios do not depend on them.

On v5e at 32k the products of exact causal attention alone, 4 * 128 * 5 * T (T + 1) / 2 operations, take 10,465,215
cycles at the chip's bf16 peak (1.97e14 a second at 1.5 GHz): 0.86 of splash's cycles there, so no kernel can go below
that ratio without leaving products out. Ours is at 0.92.
"""


def markdown(entries: list[Entry], plot: str) -> str:
    """The page."""
    parts = [INTRODUCTION, f"![cycles of our kernels over those of others]({plot})\n"]
    for kind in ("forward", "backward", "decode"):
        parts.append(f"## {kind.capitalize()}\n\n{HEADER}")
        rows = [entry for entry in entries if entry.request.kind == kind]
        parts.append("\n".join(line(entry, partner(entry, rows)) for entry in rows) + "\n")
    parts.append(bound_by_memory(entries))
    return "\n".join(parts)


def bound_by_memory(entries: list[Entry]) -> str:
    """Our decode: time of the bytes over time of the schedule."""
    found = {(e.request.kernel, e.request.tokens, e.request.chip): e for e in entries if e.cycles}
    rows = [
        "What of it binds (time of the bytes over time of the schedule, whole call; above 1 memory binds). Lost in",
        "short rows is what fills the pipeline and takes rows in and out. v4 widens 8-bit numbers slowly.\n",
        f"| cache | tokens | {' | '.join(CHIPS)} |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    for kernel in PAGES:
        for tokens in DECODE["ragged"]:
            cells = []
            for chip in CHIPS:
                entry = found.get((kernel, tokens, chip))
                seconds = entry.cycles / CHIPS[chip].ghz / 1e9 if entry and entry.cycles else 0
                cells.append(f"{seconds_of_memory(entry.request, entry.result) / seconds:.2f}" if entry else "")
            rows.append(f"| {kernel} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def partner(entry: Entry, rows: list[Entry]) -> Entry | None:
    """Our kernel at the same chip and length."""
    same = lambda r: (r.chip, r.kind, r.tokens)  # noqa: E731
    return next((e for e in rows if same(e.request) == same(entry.request) and e.request.kernel == "ours"), None)


def svg(entries: list[Entry]) -> str:
    """Bars: cycles of ours over those of each other kernel; less than 1 is faster."""
    bars = []
    for entry in entries:
        ours = partner(entry, entries)
        if ours and ours is not entry and ours.cycles and entry.cycles:
            r = entry.request
            bars.append((f"{r.kind} {r.tokens // 1024}k {r.chip} / {r.kernel}", ours.cycles / entry.cycles))
    height, left, width = 18, 250, 400
    body = []
    for i, (name, ratio) in enumerate(bars):
        y, length = 30 + i * height, width * min(ratio, 1.4) / 1.4
        color = "#2a7" if ratio <= 0.85 else "#59c" if ratio <= 1 else "#c64"
        body.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{name}</text>')
        body.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{height - 4}" fill="{color}"/>')
        body.append(f'<text x="{left + length + 5:.1f}" y="{y + 12}">{ratio:.2f}</text>')
    bottom, one = 30 + len(bars) * height, left + width / 1.4
    body.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="26" y2="{bottom}" stroke="#888" stroke-dasharray="4 3"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{bottom + 10}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{left}" y="16">cycles of ours / cycles of the other (static schedule)</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def write_table(path: Path | None, cache: Path | None) -> None:
    """Measures everything, and writes the page and its plot, or prints the page."""
    entries = collect(cache)
    if path is None:
        print(markdown(entries, "kernels.svg"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    plot = path.with_suffix(".svg")
    path.write_text(markdown(entries, plot.name))
    plot.write_text(svg(entries))
