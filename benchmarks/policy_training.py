"""Trains one policy on the standard library's sources, and says what its experts did."""

from __future__ import annotations

import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moegen
from benchmarks.policy_specs import spec
from examples.corpus import is_held_out, sources
from examples.training import CLIP, optimizer, share_of_rate

RATE = 3e-3
LAST = 50  # steps at the end whose routing is counted
BESIDE = 10  # one step of the dense model is timed beside so many
GUI = {"idlelib", "tkinter", "turtledemo"}


@dataclass(frozen=True)
class Options:
    """What is the same for all policies."""

    steps: int = 200
    batch: int = 8
    sequence: int = 128
    examined: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """Bytes, and for each of them which part of the library it is from."""

    ids: Tensor
    task: Tensor

    def at(self, starts: Tensor, length: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sequences [B, S] that begin at starts [B], and the ids that routers may read."""
        ids = self.ids[starts.unsqueeze(-1) + torch.arange(length)].long()
        letter = ((ids | 32) >= ord("a")) & ((ids | 32) <= ord("z"))
        return ids, {"task": self.task[starts].long(), "modality": letter.long()}


def texts(most: int = 16_000_000) -> tuple[Text, Text]:
    """Text to train on, and text of other files to be judged by."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[bool, tuple[bytearray, bytearray]] = {}
    for path in sources(root):
        name = path.relative_to(root)
        text, tasks = found.setdefault(is_held_out(name), (bytearray(), bytearray()))
        content = path.read_bytes()
        if len(text) + len(content) > most:
            continue
        text += content
        tasks += bytes([task_of(name)]) * len(content)
    train, held_out = (
        Text(*(torch.frombuffer(part, dtype=torch.uint8) for part in found[side]))
        for side in (False, True)
    )
    return train, held_out


def task_of(name: Path) -> int:
    """0: a module of its own, 1: tables of characters, 2: windows, 3: any other package."""
    folder = name.parts[0]
    if len(name.parts) == 1:
        return 0
    return 1 if folder == "encodings" else 2 if folder in GUI else 3


@dataclass
class Outcome:
    """What is known of a policy after its training; losses in nats a byte.

    Loads are of the last steps' batches, averaged over them and over the routed layers; unused
    are experts of all layers that none of these steps used.
    """

    name: str
    parameters: int
    active: int
    before: float
    after: float
    by_step: float
    relative_speed: float
    looks_ahead: bool = False
    load_max_over_mean: float | None = None
    load_cv2: float | None = None
    unused: int | None = None
    dropped_train: float | None = None
    dropped_eval: float | None = None
    seconds: float = math.nan

    @property
    def learned(self) -> bool:
        """Whether training lowered the loss on text held out, one byte at a time too."""
        return self.after < self.before and self.by_step < self.before


@dataclass
class Beside:
    """A dense model whose steps are timed in between, as the yardstick of speed."""

    model: Any
    adam: torch.optim.Optimizer
    times: list[float] = field(default_factory=list)


def trained(
    name: str,
    moe: dict[str, Any] | None,
    text: tuple[Text, Text],
    options: Options,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train one policy, from the dense part that all share."""
    began = time.perf_counter()
    plan = moegen.plan(spec(moe), batch=options.batch, sequence=options.sequence)
    names = plan.spec.model.given()
    model, dense = made(plan, options.seed), made(moegen.plan(spec(None)), options.seed)
    share_dense_part(dense, model)
    beside = Beside(dense, optimizer(dense, RATE))
    exam = text[1].at(starts_of_exam(text[1], options), options.sequence)
    exam = (exam[0], {key: exam[1][key] for key in names})
    before, _ = judged(model, exam, options.batch)
    times, routing = training(model, names, text[0], options, beside, tick)
    after, dropped = judged(model, exam, options.batch)
    counts = moegen.estimate(plan).counts
    outcome = Outcome(
        name=name,
        parameters=counts.total,
        active=int(counts.active),
        before=before,
        after=after,
        by_step=judged_by_step(model, exam),
        relative_speed=statistics.median(beside.times) / statistics.median(times),
        looks_ahead=bool(plan.warnings),
        dropped_eval=dropped,
    )
    if routing:
        account(outcome, routing)
    outcome.seconds = time.perf_counter() - began
    return outcome


def made(plan: Any, seed: int) -> Any:
    """An emitted model with weights of a seed."""
    torch.manual_seed(seed)
    return moegen.module(plan).Model()


def share_dense_part(dense: nn.Module, model: nn.Module) -> None:
    """Copy into a model what it has in common with the dense one, layer by layer."""
    pairs = [
        (dense, model, False),
        *((a, b, True) for a, b in zip(own(dense), own(model), strict=True)),
    ]
    with torch.no_grad():
        for source, target, deep in pairs:
            known = dict(source.named_parameters(recurse=deep))
            for name, parameter in target.named_parameters(recurse=deep):
                if name in known and known[name].shape == parameter.shape:
                    parameter.copy_(known[name])


def own(model: Any) -> list[nn.Module]:
    """Layers that every policy has; routed sublayers put in between are not."""
    return [layer for layer in model.layers if hasattr(layer, "attention")]


def starts_of_exam(text: Text, options: Options) -> Tensor:
    """Evenly spaced places of the text held out; always the same."""
    return torch.linspace(0, len(text.ids) - options.sequence, options.examined).long()


def training(
    model: Any,
    names: tuple[str, ...],
    text: Text,
    options: Options,
    beside: Beside,
    tick: Callable[[], None],
) -> tuple[list[float], list[Any]]:
    """Seconds of every step, and the routing of the last ones."""
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)
    adam, times, routing = optimizer(model, RATE), [], []
    for number in range(options.steps):
        places = len(text.ids) - options.sequence + 1
        starts = torch.randint(places, (options.batch,), generator=draw)
        ids, known = text.at(starts, options.sequence)
        rate = RATE * share_of_rate(number / options.steps)
        began = time.perf_counter()
        output = one_step(model, adam, ids, rate, {key: known[key] for key in names})
        times.append(time.perf_counter() - began)
        if number >= options.steps - LAST and hasattr(output, "routing"):
            routing.append(output.routing)
        if number % BESIDE == 0:
            began = time.perf_counter()
            one_step(beside.model, beside.adam, ids, rate, {})
            beside.times.append(time.perf_counter() - began)
        tick()
    return times, routing


def one_step(
    model: Any, adam: torch.optim.Optimizer, ids: Tensor, rate: float, given: dict[str, Tensor]
) -> Any:
    """One step; the model's Output."""
    for group in adam.param_groups:
        group["lr"] = rate
    total, output = model.training_loss(ids, **given)
    adam.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    adam.step()
    if hasattr(model, "update_balance"):
        model.update_balance(output.routing)
    return output


Exam = tuple[Tensor, dict[str, Tensor]]


def parts(exam: Exam, size: int) -> Iterator[Exam]:
    """An examination in batches."""
    for start in range(0, len(exam[0]), size):
        here = slice(start, start + size)
        yield exam[0][here], {key: value[here] for key, value in exam[1].items()}


@torch.no_grad()
def judged(model: Any, exam: Exam, size: int) -> tuple[float, float | None]:
    """Loss on sequences in evaluation, and the fraction of choices that capacity refused."""
    model.eval()
    losses, dropped = [], []
    for ids, given in parts(exam, size):
        output = model(ids, **given)
        losses.append(float(model.loss(output.logits, ids)) * len(ids))
        dropped += [float(record.dropped) for record in getattr(output, "routing", ())]
    model.train()
    return sum(losses) / len(exam[0]), statistics.fmean(dropped) if dropped else None


@torch.no_grad()
def judged_by_step(model: Any, exam: Exam) -> float:
    """Loss on the same sequences as decoding sees them: a byte at a time, knowing none to come."""
    ids, given = exam
    model.eval()
    cache = model.new_cache(*ids.shape)
    logits = []
    for place in range(ids.shape[1]):
        known = {key: v if v.ndim == 1 else v[:, place] for key, v in given.items()}
        now = ids[:, place : place + 1]
        logits.append(model.step(now, torch.tensor(place), cache, **known))
    model.train()
    return float(model.loss(torch.cat(logits, 1), ids))


def account(outcome: Outcome, steps: list[Any]) -> None:
    """Loads and refusals of the last steps."""
    first = steps[0]
    kept = range(len(first))
    loads = [torch.stack([step[layer].load for step in steps]).double() for layer in kept]
    ratios = [load / load.mean(-1, keepdim=True) for load in loads]
    outcome.load_max_over_mean = statistics.fmean(float(r.amax(-1).mean()) for r in ratios)
    outcome.load_cv2 = statistics.fmean(float(r.var(-1, correction=0).mean()) for r in ratios)
    outcome.unused = sum(int((load.sum(0) == 0).sum()) for load in loads)
    outcome.dropped_train = statistics.fmean(float(record.dropped) for s in steps for record in s)
