"""The worked cases of tests/data/golden.json, and emitted layers that are given their numbers.

A test of a case checks every value that the case expects; what it cannot is named with a reason.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moegen.api import import_package, load
from moegen.backend import backend
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.planner import Workload, lower
from moegen.spec.names import identifier

_DATA = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in _DATA["cases"]}
ABSOLUTE: float = _DATA["conventions"]["tolerance_abs"]
RELATIVE: float = _DATA["conventions"]["tolerance_rel"]

COVERED: dict[str, Callable[[], None]] = {}  # by the case's id
BESIDE: dict[str, dict[str, str]] = {}  # values that a test does not check, and why


class Case:
    """One case: its numbers, and which of the expected ones were held against ours."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.params: dict[str, Any] = CASES[name].get("params", {})
        self.inputs: dict[str, Any] = CASES[name].get("inputs", {})
        self.expected: dict[str, Any] = CASES[name]["expected"]
        self.checked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        return tensor(self.inputs[name])

    def want(self, name: str) -> Any:
        """An expected value, which the caller compares."""
        self.checked.add(name)
        return self.expected[name]

    def holds(self, **actual: Any) -> None:
        """Compare values by the names under which the case expects them."""
        for name, value in actual.items():
            same(value, self.want(name), f"{self.name}: {name}")


def worked(name: str, **beside: str) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    """A test of the case called name. beside: values it does not check, each with the reason."""

    def register(test: Callable[[Case], None]) -> Callable[[], None]:
        assert name not in COVERED, f"{name} has two tests"

        def run() -> None:
            case = Case(name)
            test(case)
            assert case.checked.isdisjoint(beside)
            assert case.checked | set(beside) == set(case.expected)

        run.__name__ = test.__name__
        COVERED[name], BESIDE[name] = run, beside
        return run

    return register


def tensor(values: Any) -> Tensor:
    """Numbers of a case: fp64, or int64 if all are whole."""
    made = torch.tensor(values)
    return torch.tensor(values, dtype=torch.float64) if made.is_floating_point() else made


def same(actual: Any, expected: Any, what: str = "") -> None:
    """Numbers within the file's tolerance; whole numbers, truths and words exactly."""
    actual = actual.tolist() if isinstance(actual, Tensor) else actual
    if isinstance(expected, list):
        assert len(actual) == len(expected), f"{what}: {actual} is not {expected}"
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            same(ours, theirs, f"{what}[{index}]")
    elif isinstance(expected, dict):
        assert set(actual) == set(expected), what
        for key, theirs in expected.items():
            same(actual[key], theirs, f"{what}.{key}")
    elif isinstance(expected, float):
        close = math.isclose(actual, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        assert close, f"{what}: {actual} is not {expected}"
    else:
        assert actual == expected, f"{what}: {actual} is not {expected}"


class Draws(TorchFunctionMode):
    """Gives random functions of torch a case's draws: uniform ones in [0, 1) where it scales.

    Each name has one tensor, or a list of them for one call after the other.
    """

    def __init__(self, **given: Tensor | list[Tensor]) -> None:
        super().__init__()
        self.given = {k: list(v) if isinstance(v, list) else [v] for k, v in given.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = self.given.get(getattr(func, "__name__", ""))
        if drawn is None:
            return func(*args, **(kwargs or {}))
        values = drawn.pop(0)
        if func.__name__ == "uniform_":
            _, low, high = args
            values = low + (high - low) * values
        if func.__name__.endswith("_"):
            return args[0].copy_(values.reshape(args[0].shape))
        return values.reshape(args[0].shape) if isinstance(args[0], Tensor) else values

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        if problem[0] is None:
            assert not any(self.given.values()), f"not drawn: {self.given}"


@dataclass
class Call:
    """One call of an op."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


def decoder(moe: dict[str, Any] | None, width: int, **model: Any) -> dict[str, Any]:
    """The spec of a decoder in fp64 that is just enough to hold a mixture."""
    base = {"kind": "decoder", "vocab_size": 8, "d_model": width, "layers": 1, "max_sequence": 16}
    attention = {"heads": 1, "head_dim": 2}
    precision = model.pop("precision", {"parameters": "fp64", "router": "fp64"})
    rest = {name: model.pop(name) for name in ("init", "train") if name in model}
    held = {"moe": moe} if moe else {}
    whole = {**base, "attention": attention, **held, **model}
    return {"name": "worked", "model": whole, "precision": precision, **rest}


def emitted(spec: dict[str, Any], *, fused: bool = False) -> ModuleType:
    """The emitted package of a spec, made once in a process; without fusions, so that its inside
    can be watched, unless asked for.
    """
    return _emitted(json.dumps(spec), fused)


@cache
def _emitted(text: str, fused: bool) -> ModuleType:
    eager = backend("eager")
    plan = lower(load(json.loads(text)), Workload(1, 8), eager.fusions if fused else ())
    place = tempfile.mkdtemp(prefix="worked-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = Path(place) / identifier(plan.spec.name)
    write(package(plan, eager), folder, force=False)
    return import_package(folder)


@contextmanager
def watched(package: ModuleType) -> Iterator[dict[str, list[Call]]]:
    """What the ops of an emitted package's model are called with, by name, and return."""
    calls: dict[str, list[Call]] = {}
    code = package.model
    ops = {k: v for k, v in vars(code).items() if getattr(v, "__module__", "") == _ops(package)}

    def spy(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = op(*args, **options)
            calls.setdefault(name, []).append(Call(args, options, result))
            return result

        return call

    for name, op in ops.items():
        setattr(code, name, spy(name, op))
    try:
        yield calls
    finally:
        for name, op in ops.items():
            setattr(code, name, op)


def _ops(package: ModuleType) -> str:
    return f"{package.__name__}.ops"


# Ops that draw, each time anew.
RANDOM = ("gaussian_noise", "uniform_noise", "gumbel_noise", "jitter", "sparing", "skip_choices")
RANDOM += ("sample_second", "mask_outputs")


class Layer:
    """The class of a mixture in an emitted package, whose parameters the case gives."""

    def __init__(self, moe: dict[str, Any], width: int, **model: Any) -> None:
        spec = decoder(moe, width, **model)
        self.package, self.spec = emitted(spec), spec
        self.ops: ModuleType = self.package.ops
        self.net: Any = self.package.model.MoE()
        self.calls: dict[str, list[Call]] = {}
        self.routing: Any = None

    def set(self, **parameters: Tensor | float) -> Layer:
        """Give parameters and buffers their values."""
        with torch.no_grad():
            for name, value in parameters.items():
                own = getattr(self.net, name)
                own.copy_(torch.as_tensor(value).expand(own.shape))
        return self

    def run(
        self, x: Tensor, *, training: bool = True, valid: Tensor | None = None, **ids: Tensor
    ) -> Tensor:
        """Outputs [T, d] for x [T, d] or [B, S, d]; what routing did is kept."""
        self.net.train(training)
        x = x if x.dim() == 3 else x.unsqueeze(0)
        if valid is None:
            valid = torch.ones(x.shape[0] * x.shape[1], dtype=torch.bool)
        with watched(self.package) as self.calls:
            out, self.routing = self.net(x, valid, **ids)
        if not torch._C._len_torch_function_stack():  # nothing is drawn in its place
            self._holds_fused(out, x, valid, ids)
        return out.flatten(0, 1)  # type: ignore[no-any-return]

    def _holds_fused(self, out: Tensor, x: Tensor, valid: Tensor, ids: dict[str, Tensor]) -> None:
        """The package as it is built, with fusions, gives the same output."""
        if any(name in vars(self.package.model) for name in RANDOM):
            return
        twin = emitted(self.spec, fused=True).model.MoE()
        twin.load_state_dict(self.net.state_dict())
        twin.train(self.net.training)
        torch.testing.assert_close(twin(x, valid, **ids)[0], out, rtol=1e-9, atol=1e-9)

    def result(self, op: str, index: int = -1) -> Any:
        """What a call of an op gave in the last run."""
        return self.calls[op][index].result

    def kept(self) -> Tensor:
        """Choices [T, k] that capacity let pass, the number of experts for the others."""
        return self.result("refuse")  # type: ignore[no-any-return]

    def slots(self) -> Tensor:
        """The place of each choice [T, k] in its expert's buffer, -1 if it has none."""
        call = self.calls["refuse"][-1]
        _, position, _, nowhere = call.args[:4]
        return torch.where(call.result < nowhere, position, -1)


def gates(router: dict[str, Any], experts: int, **moe: Any) -> Layer:
    """A layer whose input is its logits, and whose output is its combine weights [T, E]."""
    small = {"count": experts, "width": 1, "activation": "relu", "bias": True}
    model = {name: moe.pop(name) for name in ("init", "precision") if name in moe}
    layer = Layer({"experts": small, "router": router, **moe}, experts, **model)
    eye = torch.eye(experts, dtype=torch.float64)
    layer.set(up=0.0, up_bias=0.0, down=0.0, down_bias=eye)
    own = getattr(layer.net, "router", None)
    return layer.set(router=eye) if own is not None and own.shape == eye.shape else layer


def relu_experts(layer: Layer, matrices: Tensor) -> Layer:
    """Give experts [E, n, d] the function relu(W x), in their first n outputs."""
    experts, n, width = matrices.shape
    up = torch.zeros_like(layer.net.up)
    up[:, :n, :width] = matrices
    down = torch.zeros_like(layer.net.down)
    down[:, range(n), range(n)] = 1.0
    assert up.shape[0] == experts
    return layer.set(up=up, down=down)


def linear_experts(layer: Layer, matrices: Tensor) -> Layer:
    """Give experts [E, n, d] of ReLU units the function W x = relu(W x) - relu(-W x)."""
    _, n, width = matrices.shape
    up, down = torch.zeros_like(layer.net.up), torch.zeros_like(layer.net.down)
    up[:, :n, :width], up[:, n : 2 * n, :width] = matrices, -matrices
    down[:, range(n), range(n)], down[:, range(n), range(n, 2 * n)] = 1.0, -1.0
    return layer.set(up=up, down=down)


@contextmanager
def standing_in(package: ModuleType, **values: float | list[float]) -> Iterator[None]:
    """Ops of an emitted package's model that give these values, a list's one after the other."""
    code = package.model
    own = {name: getattr(code, name) for name in values}

    def stand_in(value: float | list[float]) -> Callable[..., Tensor]:
        left = value if isinstance(value, list) else None

        def op(*_: Any, **__: Any) -> Tensor:
            return tensor(float(left.pop(0)) if left is not None else value)

        return op

    for name, value in values.items():
        setattr(code, name, stand_in(list(value) if isinstance(value, list) else value))
    try:
        yield
    finally:
        for name, op in own.items():
            setattr(code, name, op)


def one_hot(experts: list[int], count: int) -> Tensor:
    """Logits whose best expert is the given one."""
    return torch.nn.functional.one_hot(torch.tensor(experts), count).double()
