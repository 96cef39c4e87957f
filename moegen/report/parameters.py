"""Tables of parameters: by role, active in each convention, against published figures."""

from __future__ import annotations

from rich.console import Console

from moegen.estimator import Estimate
from moegen.report import numbers
from moegen.report.published import CONVENTIONS, conventions, published
from moegen.report.screen import heading, note, plain, table


def role_name(role: str) -> str:
    """A role as prose has it: routed_experts as routed experts."""
    return role.replace("_", " ")


def print_parameters(screen: Console, made: Estimate) -> None:
    """Everything about parameters and buffers."""
    _by_role(screen, made)
    _active(screen, made)
    if made.by_task:
        _of_tasks(screen, made)
    _published(screen, made)


def _by_role(screen: Console, made: Estimate) -> None:
    counts = made.counts
    columns = ("role", ">parameters", ">share", ">active", ">bytes")
    footer = (
        "total",
        numbers.exact(counts.total),
        "",
        numbers.exact(counts.active),
        numbers.size(sum(made.weight_bytes.values())),
    )
    rows = table("Parameters", columns, footer=footer)
    largest_first = sorted(counts.by_role.items(), key=lambda item: -item[1].count)
    for role, share in largest_first:
        rows.add_row(
            role_name(role),
            numbers.exact(share.count),
            numbers.share(share.count, counts.total),
            numbers.exact(share.active),
            numbers.size(share.bytes),
        )
    screen.print()
    screen.print(rows)
    if counts.trained < counts.total:
        trained = numbers.exact(counts.trained)
        part = numbers.share(counts.trained, counts.total)
        note(screen, f"{made.plan.spec.train.account()} {trained} parameters are trained, {part}.")
    if counts.buffers:
        held = numbers.exact(counts.buffers)
        note(screen, f"Not counted: {held} values in buffers that checkpoints hold.")


def _of_tasks(screen: Console, made: Estimate) -> None:
    """What an example uses where one task alone is asked for."""
    unit = made.plan.spec.model.unit
    rows = table(f"Active parameters of one {unit}, by task", ("task", ">parameters", ">of all"))
    for task, used in made.by_task.items():
        rows.add_row(plain(task), numbers.exact(used), numbers.share(used, made.counts.total))
    screen.print()
    screen.print(rows)


def _active(screen: Console, made: Estimate) -> None:
    title = f"Active parameters of one {made.plan.spec.model.active_for}"
    rows = table(title, ("counted", ">parameters", ">", ">of all"))
    for key, value in conventions(made.counts).items():
        name = CONVENTIONS[key]
        share = numbers.share(value, made.counts.total)
        rows.add_row(name, numbers.exact(value), numbers.count(value), share)
    screen.print()
    screen.print(rows)


def _published(screen: Console, made: Estimate) -> None:
    spec = made.plan.spec
    found = published(made.plan.data, made.counts)
    if found is None:
        return
    heading(screen, plain(f"Published{f' ({spec.source})' if spec.source else ''}"))
    rows = table(None, ("figure", ">printed", ">counted", "verdict"))
    for figure in found.figures:
        verdict = "agrees to its digits" if figure.agrees else "differs"
        if figure.counting:
            verdict += f", {figure.counting}"
        rows.add_row(figure.name, plain(figure.printed), numbers.exact(figure.counted), verdict)
    screen.print(rows)
    if found.note:
        note(screen, plain(found.note))
