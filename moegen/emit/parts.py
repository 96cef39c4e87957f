"""The parts of a model as its class holds them: which parameters are for what, at which rates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moegen.arch.parts import Part, part_of
from moegen.emit.layout import lay_out
from moegen.planner import Plan

Rates = tuple[Part, float, float]  # a part, and factors on learning rate and weight decay


@dataclass
class _Tree:
    """What parameters below a name have for rates; numbers of layers are all one name."""

    rates: set[Rates] = field(default_factory=set)
    below: dict[str, _Tree] = field(default_factory=dict)

    def add(self, name: list[str], rates: Rates) -> None:
        self.rates.add(rates)
        if name:
            self.below.setdefault(name[0], _Tree()).add(name[1:], rates)

    def rows(self, name: str) -> Iterator[tuple[Rates, str]]:
        """The shortest names that stand for parameters of one sort."""
        if name and len(self.rates) == 1:
            yield next(iter(self.rates)), name
            return
        for part, tree in self.below.items():
            yield from tree.rows(f"{name}.{part}" if name else part)


def parts_of(plan: Plan) -> dict[Rates, list[str]]:
    """Names of parameters by part and rates; a name stands for all that is below it."""
    tree, train = _Tree(), plan.spec.train
    for site, component in plan.root.walk():
        for name, weight in component.weights.items():
            rates = train.rates_of(weight.role)
            decay = train.decay(weight.role, name, weight.shape)
            path = f"{site}.{name}".lstrip(".")
            sort = (part_of(weight.role), rates.lr, decay)
            tree.add(re.sub(r"\.\d+(?=\.)", ".*", path).split("."), sort)
    found: dict[Rates, list[str]] = {}
    for sort, name in tree.rows(""):
        found.setdefault(sort, []).append(name)
    return found


def table(plan: Plan) -> list[str]:
    """The lines of the class that hold this."""
    entries = []
    for (part, lr, decay), names in parts_of(plan).items():
        said = [f'"{text}"' for text in (part, *names)]
        said += [f"lr={lr!r}"] if lr != 1 else []
        said += [f"weight_decay={decay!r}"] if decay != 1 else []
        entries.append(f"Part({', '.join(said)})")
    last = "," if len(entries) == 1 else ""
    return lay_out(f"parts = ({', '.join(entries)}{last})", 4)
