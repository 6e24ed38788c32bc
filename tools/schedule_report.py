"""Output of `kernel_schedule`: one measurement in full, the outcome of a search, the table of all."""

import argparse
from typing import Any

from kernel_schedule import CHIPS, Request, measure


def binding(load: dict[str, float]) -> str:
    """The three busiest units."""
    busiest = sorted(load.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{unit} {share:.0%}" for unit, share in busiest)


def hottest(result: dict[str, Any]) -> dict[str, Any]:
    """The region that takes most of the cycles."""
    return max((region for kernel in result["kernels"] for region in kernel["regions"]), key=lambda r: r["cycles"])


def seconds_of_memory(request: Request, result: dict[str, Any]) -> float:
    """Time that the bytes moved take at a core's share of the bandwidth."""
    return result["moved"] / CHIPS[request.chip].hbm


def show(request: Request, result: dict[str, Any]) -> str:
    """One measurement in full."""
    if "error" in result:
        return f"{request}: {result['error']}"
    chip = CHIPS[request.chip]
    lines = []
    for kernel in result["kernels"]:
        lines.append(f"{kernel['name']}: {kernel['cycles']:,} cycles, {kernel['issued']:,} bundles issued")
        for region in kernel["regions"]:
            used = region["used"]
            lines.append(
                f"  {region['name']:44} {region['bundles']:6} cycles ({region['issued']} issued) x{region['runs']:6}"
                f" = {region['cycles'] / max(kernel['cycles'], 1):6.1%}  fills {used.get('VLOAD:FILL', 0)}"
                f" spills {used.get('VSTORE:SPILL', 0)}  {binding(region['load'])}"
            )
        lines.append("  moved MB: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in kernel["moved"].items()))
    lines.append(
        f"{result['cycles']:,} cycles = {result['cycles'] / chip.ghz / 1e3:,.0f} us at {chip.ghz} GHz; "
        f"moved {result['moved'] / 1e6:.1f} MB ({result['moved'] / result['ideal']:.2f} x ideal) = "
        f"{seconds_of_memory(request, result) * 1e6:,.0f} us of HBM; XLA temporaries {result['temporary'] / 1e6:.1f} MB"
    )
    return "\n".join(lines)


def brief(request: Request, result: dict[str, Any]) -> str:
    """One measurement in a line."""
    sizes = ",".join(map(str, request.sizes))
    if "error" in result:
        error = result["error"].splitlines()[0][:160]
        return f"{request.chip} {request.kind} {request.kernel} T={request.tokens} {sizes}: {error}"
    hot = hottest(result)
    return (
        f"{request.chip} {request.kind} {request.kernel} T={request.tokens} {sizes}: {result['cycles']:,} cycles, "
        f"issued {result['issued']:,}, HBM {result['moved'] / result['ideal']:.2f}x "
        f"temp {result['temporary'] / 1e6:.0f}MB; {hot['name']}: {binding(hot['load'])}, "
        f"fills {hot['used'].get('VLOAD:FILL', 0) / hot['bundles']:.2f}"
        f" spills {hot['used'].get('VSTORE:SPILL', 0) / hot['bundles']:.2f} a cycle"
    )


def run_command(options: argparse.Namespace) -> None:
    """Does what the command line says."""
    if options.command == "table":
        from schedule_table import write_table

        write_table(options.write, options.cache)
        return
    for text in options.sizes:
        request = Request(
            options.chip, options.kind, options.kernel, options.tokens, tuple(int(x) for x in text.split(","))
        )
        result = measure(request, cache=options.cache, keep=options.keep)
        print((show if options.command == "show" else brief)(request, result), flush=True)
