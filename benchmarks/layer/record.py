"""Results as data, to and from JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.layer.shapes import Workload

PACKAGES = (
    *("torch", "triton", "transformers", "moegen", "liger-kernel", "scattermoe", "moe-ops"),
    *("sonic-moe", "numpy"),
)


@dataclass
class Outcome:
    """One variant on one workload.

    state: right, wrong (an error is out of bounds: no figures), failed (it raised), refused (not
    for this workload). errors: relative error of each tensor and of its worst row. milliseconds
    and speedups (over the fastest peer, of paired samples) by kind of step. kernels: milliseconds
    of a whole step by kernel, if profiled.
    """

    variant: str
    family: str
    state: str = "right"
    why: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    repeatable: bool | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    kept: int | None = None
    kept_routing: int | None = None
    peak: int | None = None
    kernels: dict[str, float] = field(default_factory=dict)

    def milliseconds_of(self, kind: str) -> float | None:
        """Of a kind of step; of backward what the whole takes beyond forward."""
        if kind == "backward":
            both, forward = (self.milliseconds.get(k) for k in ("both", "forward"))
            return None if both is None or forward is None else both - forward
        return self.milliseconds.get(kind)


@dataclass
class Case:
    """One workload and what each variant did on it."""

    work: Workload
    reference: str
    touched_experts: float
    outcomes: list[Outcome] = field(default_factory=list)
    fastest_peer: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """Variants that do not match: while there are any, no speed-up is shown."""
        return [o.variant for o in self.outcomes if o.state == "wrong"]

    def outcome(self, variant: str) -> Outcome | None:
        """That of a variant."""
        return next((o for o in self.outcomes if o.variant == variant), None)


@dataclass
class Run:
    """What one or several commands measured."""

    machine: dict[str, Any]
    commands: list[str]
    absent: dict[str, str] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON; written beside first, so that what is cut off leaves the last whole one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def read(paths: list[Path]) -> Run:
    """One run out of several files; a later case replaces an earlier one of the same workload."""
    run: Run | None = None
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        cases = [_case(entry) for entry in data["cases"]]
        if run is None:
            run = Run(data["machine"], list(data["commands"]), data["absent"], cases)
            continue
        if run.machine["device"] != data["machine"]["device"]:
            raise ValueError(f"{path} is of another device: {data['machine']['device']}")
        run.commands += data["commands"]
        run.absent = {k: v for k, v in run.absent.items() if k in data["absent"]}
        seen = {case.work for case in cases}
        run.cases = [case for case in run.cases if case.work not in seen] + cases
    if run is None:
        raise ValueError("no files given")
    return run


def _case(data: dict[str, Any]) -> Case:
    outcomes = [Outcome(**entry) for entry in data["outcomes"]]
    for outcome in outcomes:
        outcome.errors = {k: (v[0], v[1]) for k, v in outcome.errors.items()}
    return Case(**{**data, "work": Workload(**data["work"]), "outcomes": outcomes})


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and the versions of what ran on it."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _installed(name))},
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return facts | {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
            "cuda": str(torch.version.cuda),
        }
    return facts | {
        "device": f"CPU, {_processor()}, {torch.get_num_threads()} threads",
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()
