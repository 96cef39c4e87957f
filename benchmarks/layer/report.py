"""Results as a page of tables."""

from __future__ import annotations

from typing import Any

from benchmarks.layer.record import Case, Outcome, Run
from benchmarks.layer.shapes import floor_seconds

KINDS = {
    "inference": "inference",
    "forward": "forward",
    "backward": "backward",
    "both": "forward+backward",
    "routed inference": "inference, routed",
    "routed both": "forward+backward, routed",
    "graph": "inference, graph",
}
NOTES = """
Times are medians in milliseconds; TF are TFLOP/s (GF GFLOP/s) of the experts' products: 6 T K n d
forward, twice as many backward. Forward keeps what backward needs, inference keeps nothing, and
backward is forward+backward less forward. All sort the choices by expert and sum the results by
token; "routed" also chooses experts and weights from the router's logits; the router's product is
in none. Gradients of weights are written, not added to older ones. Bandwidth is that of the CUDA
graph where there is one.

Kept bytes are of unique storages that autograd saves, parameters left out, a token; those of
routing (integers, and numbers of which there is one a choice) stand behind the plus. Peak bytes
are those of forward+backward beyond inputs and weights; gradients of weights are among them.

Errors are the worst relative one of output and gradients against the reference. "times" is how
many times as fast as the fastest peer of the same column, of paired samples; it is shown only
where every variant that ran is right.
""".strip()


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Of markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def teraflops(case: Case, outcome: Outcome, kind: str) -> float | None:
    """TFLOP/s of a kind of step."""
    milliseconds = outcome.milliseconds_of(kind)
    if not milliseconds or milliseconds < 0:
        return None
    times = {"backward": 2, "both": 3, "routed both": 3}.get(kind, 1)
    return times * case.work.flops / milliseconds / 1e9


def bandwidth(case: Case, outcome: Outcome) -> float | None:
    """Bytes of touched experts over the time of inference, as a graph where there is one."""
    found = (outcome.milliseconds.get(kind) for kind in ("graph", "inference"))
    milliseconds = next((m for m in found if m), None)
    touched = case.work.weight_bytes / case.work.experts * case.touched_experts
    return touched / milliseconds * 1e3 if milliseconds else None


def _number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else format(value, form)


def _error(outcome: Outcome) -> str:
    worst = max((whole for whole, _ in outcome.errors.values()), default=None)
    return "-" if worst is None else f"{worst:.1e}"


def _row(case: Case, outcome: Outcome, kinds: list[str], machine: dict[str, Any]) -> list[str]:
    cells = [outcome.variant]
    if outcome.state != "right":
        return [*cells, outcome.state, *[""] * (len(kinds) + _extras(case) - 1)]
    timed = not machine.get("interpreter")
    for kind in kinds:
        if not timed:  # its times say nothing of kernels
            cells.append("ran" if outcome.milliseconds_of(kind) is not None else "-")
            continue
        text = _number(outcome.milliseconds_of(kind))
        rate = teraflops(case, outcome, kind)
        if rate is not None and not case.work.decodes:
            text += f" ({_number(rate)} TF)" if rate >= 1 else f" ({rate * 1e3:.0f} GF)"
        if kind in outcome.speedups and not case.wrong:
            text += f", {outcome.speedups[kind]:.2f} times"
        cells.append(text)
    if case.work.decodes:
        rate = bandwidth(case, outcome)
        copy = machine.get("rates", {}).get("copy_bandwidth")
        cells.append(_number(rate / 1e9 if rate and timed else None))
        cells.append(f"{rate / copy:.0%}" if rate and copy else "-")
    else:
        tokens = case.work.tokens
        kept = "-"
        if outcome.kept is not None and outcome.kept_routing is not None:
            kept = f"{outcome.kept / tokens:,.0f} + {outcome.kept_routing / tokens:,.0f}"
        cells += [kept, _number(outcome.peak and outcome.peak / 1e9)]
        cells.append({True: "yes", False: "no", None: "-"}[outcome.repeatable])
    return [*cells, _error(outcome)]


def _extras(case: Case) -> int:
    return 3 if case.work.decodes else 4


def section(case: Case, machine: dict[str, Any]) -> str:
    """One workload: its table, then what was not measured and why."""
    work = case.work
    order = [kind for kind in KINDS if any(o.milliseconds_of(kind) for o in case.outcomes)]
    heads = ["variant", *(KINDS[kind] for kind in order)]
    if work.decodes:
        heads += ["GB/s of touched weights", "of copying", "error"]
    else:
        heads += ["kept bytes a token", "peak GB", "bits repeat", "error"]
    rows = [_row(case, outcome, order, machine) for outcome in case.outcomes]
    lines = [f"## {work.title}", "", table(heads, rows), ""]
    touched = f"Experts touched: {case.touched_experts:.0f} of {work.experts}."
    lines.append(f"Reference: {case.reference}. {touched}")
    if not work.decodes:
        lines[-1] += f" Kept at least: {work.kept_bytes / work.tokens:,.0f} bytes a token."
    rates = machine.get("rates")
    if rates and not work.decodes:
        floors = floor_seconds(work, rates["matmul_flops"], rates["copy_bandwidth"])
        forward, backward = (1e3 * seconds for seconds in floors)
        lines.append(f"Floor: forward {forward:.3g} ms, forward+backward {forward + backward:.3g}.")
    if machine.get("interpreter"):
        pass
    elif case.wrong:
        lines.append(f"No speed-up is shown, since these are wrong: {', '.join(case.wrong)}.")
    elif case.fastest_peer:
        each = (f"{KINDS[kind]}: {name}" for kind, name in case.fastest_peer.items())
        lines.append(f"Fastest peers: {'; '.join(each)}.")
    lines += [f"\n- {o.variant}: {o.state}: {o.why}" for o in case.outcomes if o.why]
    return "\n".join(lines)


def facts(run: Run) -> str:
    """The device and versions, and the commands, in two paragraphs."""
    known = run.machine
    lines = [f"{known['device']}, {known['date']}"]
    for key in ("capability", "cuda", "processors", "load", "tiles", "clock"):
        if key in known:
            lines.append(f"{key} {known[key]}")
    lines += [f"{name} {found}" for name, found in known["versions"].items()]
    for key, unit, scale in (("matmul_flops", "TFLOP/s", 1e12), ("copy_bandwidth", "GB/s", 1e9)):
        if key in known.get("rates", {}):
            title = "8192³ product" if key == "matmul_flops" else "copy"
            lines.append(f"{title} {known['rates'][key] / scale:,.0f} {unit}")
    text = ", ".join(lines) + "."
    if known.get("interpreter"):
        text += " Triton's interpreter ran its kernels: its times say nothing about them."
    return text + "\n\n" + "\n".join(f"    {command}" for command in run.commands)


def page(run: Run) -> str:
    """All of a run as markdown."""
    parts = ["# A routed layer, measured", facts(run), NOTES]
    if run.absent:
        listed = (f"- {name}: {why}" for name, why in run.absent.items())
        parts.append("Not installed or not for this device:\n\n" + "\n".join(listed))
    parts += [section(case, run.machine) for case in run.cases]
    return "\n\n".join(parts) + "\n"
