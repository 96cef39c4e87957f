"""Times the compiler: the command's start, a cold estimate, and the warm steps of a build.

Run from the repository root as `python benchmarks/compile_times.py`. Every command and every spec
is measured in processes of its own; the table shows medians. "Warm" means that torch is loaded
and one tiny spec was planned before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPECS = {
    "tiny": ("specs/tiny.yaml", {}),
    "deepseek-v3": ("specs/deepseek-v3.yaml", {}),
    "60 layers x 2,048 experts": (
        "specs/deepseek-v3.yaml",
        {"name": "large", "model.layers": 60, "moe.experts.count": 2048},
    ),
}

# Run in a fresh process: prints one JSON object.
WARM = """
import json, sys, time
import moegen
from moegen.backend import backend
from moegen.emit.package import package
from moegen.passes.sizes import prove_sizes
moegen.build("specs/tiny.yaml", sys.argv[3])
loaded = moegen.load(sys.argv[1], json.loads(sys.argv[2]))
start = time.perf_counter()
plan = moegen.plan(loaded)
planned = time.perf_counter()
moegen.estimate(plan)
estimated = time.perf_counter()
made = package(plan, backend("eager"))
emitted = time.perf_counter()
prove_sizes(loaded)
proven = time.perf_counter()
print(json.dumps({
    "plan": planned - start,
    "estimate": estimated - planned,
    "emit": emitted - estimated,
    "prove": proven - emitted,
    "parameters": sum(n for n, _, _ in plan.root.totals().values()),
    "lines": len(made.files["model.py"].splitlines()),
}))
"""
HELP = "import sys; sys.argv = ['moegen', '--help']; from moegen.cli import main\n"
LOADED = HELP + "try:\n main()\nexcept SystemExit:\n print('torch' in sys.modules)"


def run(*command: str) -> str:
    """Standard output of a Python process in the repository's root."""
    made = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return made.stdout


def wall(repeats: int, *command: str) -> float:
    """Median seconds of a process from start to end."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*command)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def warm(repeats: int, spec: str, overrides: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Medians of what the steps take, each repeat in a process of its own."""
    found = [
        json.loads(run("-c", WARM, spec, json.dumps(overrides), scratch)) for _ in range(repeats)
    ]
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    return middle | {key: int(middle[key]) for key in ("parameters", "lines")}


def measured(repeats: int) -> dict[str, Any]:
    """All figures, in seconds."""
    import tempfile

    facts = machine()
    run("-m", "moegen", "--help")  # writes the byte code
    commands = {
        "moegen --help": wall(repeats, "-m", "moegen", "--help"),
        "moegen estimate specs/deepseek-v3.yaml": wall(
            repeats, "-m", "moegen", "estimate", "specs/deepseek-v3.yaml"
        ),
        "python -c 'import torch'": wall(repeats, "-c", "import torch"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        specs = {
            name: warm(repeats, spec, overrides, f"{scratch}/tiny")
            for name, (spec, overrides) in SPECS.items()
        }
    return {
        "commands": commands,
        "help imports torch": run("-c", LOADED).splitlines()[-1] == "True",
        "specs": specs,
        "machine": facts,
        "command": shlex.join(["python", "benchmarks/compile_times.py", *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import importlib.metadata

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "moegen": importlib.metadata.version("moegen"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = found["machine"]
    torch = "imports torch" if found["help imports torch"] else "does not import torch"
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load before'][0]} before; "
        f"Python {facts['python']}, torch {facts['torch']}, {facts['date']}; "
        f"`{found['command']}`",
        "",
        "| whole process | seconds |",
        "|---|---|",
        *(f"| `{name}` | {seconds:.2f} |" for name, seconds in found["commands"].items()),
        "",
        f"`moegen --help` {torch}.",
        "",
        "| warm | parameters | plan, s | estimate, s | emit, s | prove sizes, s | lines |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, spec in found["specs"].items():
        times = " | ".join(f"{spec[key]:.3f}" for key in ("plan", "estimate", "emit", "prove"))
        lines.append(f"| {name} | {spec['parameters']:,} | {times} | {spec['lines']} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, and the table beside it")
    arguments = parser.parse_args()
    found = measured(arguments.repeats)
    print(table(found))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
        arguments.json.with_suffix(".md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
