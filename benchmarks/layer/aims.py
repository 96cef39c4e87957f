"""What the Triton backend shall reach, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.layer.record import Case, Outcome, Run
from benchmarks.layer.report import bandwidth, table, teraflops

# On an H100, bf16, random routing.
QWEN3 = "qwen3-30b-a3b"
CASES = (
    *((QWEN3, tokens) for tokens in (1, 8, 64, 4096, 5034, 32768)),
    ("sonic-30b-n512", 32768),
    ("sonic-7b-n256", 24576),
    *(("mixtral", tokens) for tokens in (1, 8, 64, 8192, 16384, 32768)),
)
WITHIN = 0.15
DECODE_SHARE = 0.85
CPU_TIMES = 1.2

Figure = Callable[[Case, Outcome], float | None]


@dataclass(frozen=True)
class Aim:
    """A bound on a figure of the fastest of our Triton variants; `up` if more is better."""

    layer: str
    tokens: int
    kind: str
    unit: str
    bound: float
    stretch: float | None = None

    @property
    def up(self) -> bool:
        """Whether more is better."""
        return self.unit != "ms"


AIMS = (
    Aim(QWEN3, 32768, "forward", "ms", 4.85, 4.5),
    Aim(QWEN3, 32768, "both", "ms", 17.0, 15.0),
    Aim(QWEN3, 4096, "both", "ms", 3.2, 2.2),
    Aim(QWEN3, 5034, "inference", "ms", 0.80, 0.72),
    Aim("sonic-30b-n512", 32768, "forward", "TFLOP/s", 430, 500),
    Aim("sonic-30b-n512", 32768, "backward", "TFLOP/s", 420, 500),
    Aim("sonic-7b-n256", 24576, "forward", "TFLOP/s", 300, 364),
    Aim("sonic-7b-n256", 24576, "backward", "TFLOP/s", 300, 404),
    *(
        Aim("mixtral", tokens, kind, "TFLOP/s", bound, 620)
        for tokens in (8192, 16384, 32768)
        for kind, bound in (("forward", 560), ("backward", 520))
    ),
)


@dataclass(frozen=True)
class Judged:
    """An aim beside what was measured: passed is None where nothing was."""

    what: str
    aim: str
    measured: str
    passed: bool | None
    stretch: str = ""

    def row(self) -> list[str]:
        """Of the table."""
        words = {True: "pass", False: "fail", None: "not measured"}
        return [self.what, self.aim, self.measured, words[self.passed], self.stretch]


def best(case: Case, figure: Figure, *, up: bool) -> tuple[Outcome, float] | None:
    """The best figure among our Triton variants that save the first product."""
    known = [
        (outcome, value)
        for outcome in case.outcomes
        if outcome.family == "ours, Triton"
        and "recompute" not in outcome.variant
        and (value := figure(case, outcome)) is not None
    ]
    return (max if up else min)(known, key=lambda pair: pair[1], default=None)


def milliseconds(kind: str) -> Figure:
    """The time of a kind of step."""
    return lambda case, outcome: outcome.milliseconds_of(kind)


def rate(kind: str) -> Figure:
    """The TFLOP/s of a kind of step."""
    return lambda case, outcome: teraflops(case, outcome, kind)


def _find(run: Run, layer: str, tokens: int) -> Case | None:
    return next(
        (
            case
            for case in run.cases
            if (case.work.layer, case.work.tokens) == (layer, tokens)
            and (case.work.dtype, case.work.routing) == ("bf16", "random")
        ),
        None,
    )


def _judge(run: Run, aim: Aim) -> Judged:
    what = f"{aim.layer} T={aim.tokens} {'forward+backward' if aim.kind == 'both' else aim.kind}"
    sign = ">=" if aim.up else "<="
    stretch = "" if aim.stretch is None else f"{sign} {aim.stretch:g}"
    wanted = f"{sign} {aim.bound:g} {aim.unit}"
    case = _find(run, aim.layer, aim.tokens)
    figure = rate(aim.kind) if aim.up else milliseconds(aim.kind)
    found = None if case is None else best(case, figure, up=aim.up)
    if found is None:
        return Judged(what, wanted, "", None, stretch)
    outcome, value = found
    passed = value >= aim.bound if aim.up else value <= aim.bound
    return Judged(what, wanted, f"{value:.3g} ({outcome.variant})", passed, stretch)


def _decoding(run: Run) -> list[Judged]:
    """Decoding is bound by the weights of the experts that the tokens choose."""
    copy = run.machine.get("rates", {}).get("copy_bandwidth")
    judged = []
    for case in run.cases:
        if not case.work.decodes or not copy:
            continue
        what = f"{case.work.layer} T={case.work.tokens} bytes of touched weights"
        wanted = f">= {DECODE_SHARE:.0%} of copying"
        found = best(case, bandwidth, up=True)
        if found is None:
            judged.append(Judged(what, wanted, "", None))
            continue
        share = found[1] / copy
        measured = f"{share:.0%} ({found[0].variant})"
        judged.append(Judged(what, wanted, measured, share >= DECODE_SHARE))
    return judged


def _peers(run: Run) -> list[Judged]:
    """Faster than every peer written in Triton, at every shape, forward and backward."""
    judged = []
    for case in run.cases:
        for kind in ("inference",) if case.work.decodes else ("forward", "backward"):
            theirs = {
                o.variant: ms
                for o in case.outcomes
                if o.family == "Triton" and (ms := o.milliseconds_of(kind)) is not None
            }
            found = best(case, milliseconds(kind), up=False)
            if not theirs or found is None:
                continue
            name = min(theirs, key=lambda peer: theirs[peer])
            what = f"{case.work.layer} T={case.work.tokens} {kind}"
            measured = f"{found[1]:.3g} ms ({found[0].variant})"
            wanted = f"< {theirs[name]:.3g} ms ({name})"
            judged.append(Judged(what, wanted, measured, found[1] < theirs[name]))
    return judged


def _kept(run: Run) -> list[Judged]:
    """No more than the floor, routing data aside; nothing of the first product if recomputed."""
    found = []
    for case in run.cases:
        for outcome in case.outcomes:
            if not outcome.family.startswith("ours") or outcome.kept is None:
                continue
            bound = case.work.kept_bytes
            if "recompute" in outcome.variant:
                bound = case.work.tokens * case.work.d * case.work.itemsize
            elif "torch.compile" in outcome.variant:
                continue
            what = (
                f"{case.work.layer} T={case.work.tokens} {case.work.dtype} {outcome.variant}, kept"
            )
            tokens = case.work.tokens
            wanted = f"<= {bound / tokens:,.0f} bytes a token"
            measured = f"{outcome.kept / tokens:,.0f}"
            found.append(Judged(what, wanted, measured, outcome.kept <= bound))
    return found


def _predictions(run: Run) -> list[Judged]:
    judged = []
    for case in run.cases:
        for kind, predicted in case.predicted.items():
            found = best(case, milliseconds(kind), up=False)
            if found is None:
                continue
            off = predicted / found[1] - 1
            what = f"{case.work.layer} T={case.work.tokens} predicted {kind}"
            measured = f"{predicted:.3g} ms, {off:+.0%} ({found[0].variant})"
            judged.append(Judged(what, f"within {WITHIN:.0%}", measured, abs(off) <= WITHIN))
    return judged


def _cpu(run: Run) -> list[Judged]:
    found = []
    for case in run.cases:
        if not case.work.layer.startswith("cpu"):
            continue
        mine = case.outcome("moegen eager")
        times = mine.speedups.get("both") if mine is not None else None
        peer = case.fastest_peer.get("both", "")
        what = f"{case.work.layer} {case.work.dtype} eager forward+backward"
        measured = "" if times is None else f"{times:.2f} times as fast as {peer}"
        passed = None if times is None else times >= CPU_TIMES
        found.append(Judged(what, f">= {CPU_TIMES} times the fastest", measured, passed))
    return found


def judge(run: Run) -> list[Judged]:
    """Every aim that the run's device is meant for."""
    if not run.machine["device"].startswith("CPU"):
        parts = [_judge(run, aim) for aim in AIMS]
        return [*parts, *_decoding(run), *_peers(run), *_predictions(run), *_kept(run)]
    return [*_cpu(run), *_kept(run)]


def aims_page(run: Run) -> str:
    """All aims as a table."""
    judged = judge(run)
    passed = sum(j.passed is True for j in judged)
    failed = sum(j.passed is False for j in judged)
    heads = ["figure", "aim", "measured", "", "stretch"]
    summary = f"{passed} aims met, {failed} missed, {len(judged) - passed - failed} not measured."
    return f"{table(heads, [j.row() for j in judged])}\n\n{summary}"
