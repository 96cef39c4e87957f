"""The benchmark of a routed layer: it runs, refuses wrong variants, and counts what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import moe_layer
from benchmarks.layer import aims, check, measure
from benchmarks.layer.inputs import Batch, Inputs, make_inputs, router_logits
from benchmarks.layer.memory import kept_by_graph, kept_by_hooks
from benchmarks.layer.peers import GROUPED_MM, PEERS
from benchmarks.layer.record import Case, Outcome, Run, read
from benchmarks.layer.reference import NAMES, error, reference, verdict
from benchmarks.layer.report import page
from benchmarks.layer.shapes import BY_NAME, LAYERS, Workload, floor_seconds, workload
from benchmarks.layer.timing import Samples
from benchmarks.layer.variants import EAGER, Absent, Forward, Variant

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WORK = Workload("some", 70, 16, 8, 5, 2, "fp32", "random")


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(WORK, CPU)


def test_the_command_runs_every_variant_with_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.moe_layer", "--tiny", "--aims", "--predict"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    made = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    run = read([tmp_path / "moe_layer_tiny.json"])
    assert [case.work.tokens for case in run.cases] == [1, 5]
    allowed = {peer.name for peer in PEERS if peer.family in ("Triton", "CuTe")}
    assert set(run.absent) <= allowed
    for case in run.cases:
        states = {o.variant: o.state for o in case.outcomes}
        refused = {name for name, state in states.items() if state == "refused"}
        assert refused <= {"torch grouped_mm + torch.compile, aot_eager"}
        assert set(states.values()) <= {"right", "refused"}, case.outcomes
        assert sum(o.family == "ours, Triton" for o in case.outcomes) == 3
    for outcome in run.cases[1].outcomes:
        if outcome.family.startswith("ours") and "compile" not in outcome.variant:
            tokens = run.cases[1].work.tokens * run.cases[1].work.d * 4
            floor = tokens if "recompute" in outcome.variant else run.cases[1].work.kept_bytes
            assert outcome.kept == floor, outcome
    assert all(judged.passed for judged in aims.judge(run))
    text = (tmp_path / "moe_layer_tiny.md").read_text(encoding="utf-8")
    assert " times |" not in text
    assert "moegen Triton" in text
    assert (tmp_path / "moe_layer_tiny.png").stat().st_size > 10_000


def wrong(work: Workload, inputs: Inputs) -> Forward:
    """Right but for one token."""
    forward = EAGER.make(work, inputs)

    def run(batch: Batch) -> Tensor:
        share = torch.ones(work.tokens, 1)
        share[3] = 1.01
        return forward(batch) * share

    return run


def test_a_wrong_variant_gets_no_figures_and_no_case_of_it_a_speed_up() -> None:
    options = measure.Options(seconds=0, least=1, most=1)
    variants = [EAGER, GROUPED_MM, Variant("crooked", "torch", wrong)]
    case = measure.make_case(WORK, variants, CPU, options, {})
    crooked = case.outcome("crooked")
    assert crooked is not None
    assert crooked.state == "wrong"
    assert "; out off by" in crooked.why
    assert not crooked.milliseconds
    assert crooked.kept is None
    ours = case.outcome(EAGER.name)
    assert ours is not None
    assert ours.milliseconds["both"] > 0
    assert not ours.speedups
    run = Run({"device": "CPU", "date": "", "versions": {}}, ["command"], {}, [case])
    assert "No speed-up is shown, since these are wrong: crooked." in page(run)
    assert "times |" not in page(run)
    right = measure.make_case(WORK, variants[:2], CPU, options, {})
    assert set(right.outcomes[0].speedups) == set(right.outcomes[0].milliseconds)
    run.cases = [right]
    assert " times |" in page(run)


def test_what_raises_and_what_is_absent_is_said(inputs: Inputs) -> None:
    def breaks(work: Workload, inputs: Inputs) -> Forward:
        def run(batch: Batch) -> Tensor:
            raise RuntimeError("no such kernel\nmore")

        return run

    def missing(work: Workload, inputs: Inputs) -> Forward:
        raise Absent("import missing: no module")

    absent: dict[str, str] = {}
    options = measure.Options(seconds=0, least=1, most=1)
    variants = [
        Variant("broken", "torch", breaks),
        Variant("missing", "Triton", missing),
        Variant("choosy", "torch", breaks, lambda work: "too large"),
    ]
    case = measure.make_case(WORK, variants, CPU, options, absent)
    assert absent == {"missing": "import missing: no module"}
    assert [(o.state, o.why) for o in case.outcomes] == [
        ("failed", "RuntimeError: no such kernel"),
        ("refused", "too large"),
    ]


def test_the_reference_is_that_of_autograd_in_float64(inputs: Inputs) -> None:
    batch = inputs.batches[0]
    expected = reference(WORK, inputs, batch)
    wide = Inputs(
        torch.nn.Parameter(inputs.up.detach().double()),
        torch.nn.Parameter(inputs.down.detach().double()),
        [replace(batch, grad=batch.grad.double())],
    )
    for name in ("x", "weights"):
        value = getattr(batch, name).detach().double().requires_grad_()
        setattr(wide.batches[0], name, value)

    def loop(b: Batch) -> Tensor:
        out = torch.zeros_like(b.x)
        for token in range(WORK.tokens):
            for k in range(WORK.k):
                e = int(b.experts[token, k])
                gate, up = (wide.up[e] @ b.x[token]).chunk(2)
                row = wide.down[e] @ (torch.nn.functional.silu(gate) * up)
                out = out.index_add(0, torch.tensor([token]), (row * b.weights[token, k])[None])
        return out

    for name, value in check.gradients(loop, wide).items():
        assert value is not None
        assert max(error(value, expected.tensors[name])) < 1e-12, name


def test_one_wrong_row_of_many_and_nan_are_out_of_bounds() -> None:
    exact = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    assert not verdict({"out": error(exact.bfloat16(), exact.double())}, "bf16")
    moved = exact.clone()
    moved[4500] = exact[4499]
    assert error(moved, exact)[0] < 2e-2
    assert verdict({"out": error(moved, exact)}, "bf16")
    moved[4500] = float("nan")
    assert verdict({"out": error(moved, exact)}, "bf16")
    assert verdict({"out": error(exact[:-1], exact)}, "bf16")


def test_kept_bytes_are_of_unique_storages_without_parameters(inputs: Inputs) -> None:
    batch = inputs.batches[0]

    def both_ways(batch: Batch) -> Tensor:
        gate = batch.x @ inputs.up[0].t()
        return gate * gate.view(-1, gate.shape[-1]) * batch.weights[:, :1]

    hooks = kept_by_hooks(lambda: both_ways(batch), inputs, WORK)
    gate = WORK.tokens * 2 * WORK.n * 4
    tokens = WORK.tokens * WORK.d * 4
    assert hooks.activations == 2 * gate + tokens  # x, the product and its square
    assert hooks.routing == WORK.tokens * WORK.k * 4

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w, x[:2])
            return x * 2

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
            return grads[0]

    by_graph = kept_by_graph(lambda: Keep.apply(batch.x, inputs.up) * 3, inputs, WORK)
    assert by_graph.activations == tokens


@pytest.mark.parametrize(("routing", "most"), [("random", 2.5), ("balanced", 1.01)])
def test_routing_spreads_rows_as_named(routing: str, most: float) -> None:
    work = replace(WORK, tokens=100, routing=routing)
    batch = make_inputs(work, CPU).batches[0]
    load = torch.bincount(batch.experts.flatten(), minlength=work.experts)
    assert load.max() / load.float().mean() < most
    hot = router_logits(replace(work, routing="hot"), torch.Generator().manual_seed(1), CPU)
    assert set(hot.topk(2).indices.flatten().tolist()) == {0, 1}
    zipf = router_logits(replace(work, routing="zipf"), torch.Generator().manual_seed(1), CPU)
    first = torch.bincount(zipf.argmax(-1), minlength=work.experts)
    assert first[0] > 2 * first[-1]


def test_floors_and_sizes_are_those_of_the_formulas() -> None:
    work = workload(BY_NAME["qwen3-30b-a3b"], 32768, "bf16", "random")
    assert work.kept_bytes == work.tokens * (2 * 2048 + 4 * 8 * 768)
    forward, backward = floor_seconds(work, 800e12, 3e12)
    assert forward == pytest.approx(3.09e-3, rel=0.01)
    assert backward == pytest.approx(6.18e-3, rel=0.01)
    small = replace(work, tokens=4096)
    assert floor_seconds(small, 800e12, 3e12)[0] == pytest.approx(0.41e-3, rel=0.02)
    assert {layer.name for layer in LAYERS} >= {name for name, _ in aims.CASES}


def outcome(variant: str, family: str, forward: float, both: float) -> Outcome:
    return Outcome(variant, family, milliseconds={"forward": forward, "both": both})


def test_aims_take_the_best_of_ours_and_say_what_is_missed() -> None:
    work = workload(BY_NAME["qwen3-30b-a3b"], 32768, "bf16", "random")
    case = Case(work, "float64", 128)
    case.predicted = {"forward": 4.0, "both": 20.0}
    case.outcomes = [
        outcome("moegen Triton", "ours, Triton", 4.8, 18.0),
        outcome("moegen Triton, permuted", "ours, Triton", 5.0, 16.5),
        outcome("Liger", "Triton", 5.1, 15.0),
    ]
    run = Run({"device": "NVIDIA H100", "rates": {}}, [], {}, [case])
    judged = {j.what: j for j in aims.judge(run)}
    name = "qwen3-30b-a3b T=32768"
    assert judged[f"{name} forward"].passed is True  # that against the peer, which comes last
    assert judged[f"{name} forward+backward"].measured == "16.5 (moegen Triton, permuted)"
    assert judged[f"{name} backward"].passed is False
    assert judged[f"{name} predicted forward"].passed is False
    assert judged["mixtral T=8192 forward"].passed is None
    assert "missed" in aims.aims_page(run)


def test_files_are_merged_by_workload(tmp_path: Path) -> None:
    work = workload(BY_NAME["olmoe"], 1024, "bf16", "random")
    for i, tokens in enumerate((1024, 4096, 1024)):
        case = Case(replace(work, tokens=tokens), "float64", i)
        Run({"device": "some GPU"}, [str(i)], {}, [case]).write(tmp_path / f"{i}.json")
    merged = read([tmp_path / f"{i}.json" for i in range(3)])
    assert [(c.work.tokens, c.touched_experts) for c in merged.cases] == [(4096, 1), (1024, 2)]
    assert merged.commands == ["0", "1", "2"]
    other = json.loads((tmp_path / "0.json").read_text())
    other["machine"]["device"] = "another"
    (tmp_path / "3.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another device"):
        read([tmp_path / "0.json", tmp_path / "3.json"])


def test_ratios_are_of_paired_samples() -> None:
    samples = Samples({"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 4.0, 8.0, 100.0]})
    assert samples.ratio("ours", "theirs") == 2.0


def test_the_cpu_is_measured_beside_dense_products(tmp_path: Path) -> None:
    words = [
        "--cpu",
        "--aims",
        "--own-time",
        "--shape",
        "tiny",
        "--tokens",
        "9",
        "--kind",
        "both",
        "--seconds",
        "0",
    ]
    words += ["--kind", "both", "--seconds", "0", "--dtype", "fp32"]
    given = [*words, "--variant", "moegen eager", "--variant", "torch"]
    result = CliRunner().invoke(moe_layer.main, [*given, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (case,) = read([tmp_path / "moe_layer_cpu.json"]).cases
    assert [o.variant for o in case.outcomes] == [
        "moegen eager",
        "moegen eager, recompute",
        "torch grouped_mm",
        "dense products (ceiling)",
    ]
    assert all(o.milliseconds["both"] > 0 for o in case.outcomes)
    again = ["--from", str(tmp_path / "moe_layer_cpu.json"), "--aims", "--out", str(tmp_path)]
    assert CliRunner().invoke(moe_layer.main, [*again, "--name", "again"]).exit_code == 0
    assert "moegen eager, recompute" in (tmp_path / "again.md").read_text(encoding="utf-8")


def test_without_a_gpu_the_command_says_what_needs_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(moe_layer.main, [])
    assert result.exit_code != 0
    assert "--tiny" in result.output


def test_names_of_the_reference_are_those_of_gradients(inputs: Inputs) -> None:
    found = check.gradients(EAGER.make(WORK, inputs), inputs)
    assert tuple(found) == NAMES
