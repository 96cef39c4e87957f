"""Packages with kernels: they compute what those without do, and say what they are made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from routing_specs import ROUTED
from tiny_models import filled
from tiny_specs import SPECS

import moegen
from moegen.api import check, import_package
from moegen.backend import backend
from moegen.cli import cli
from moegen.emit.package import package
from moegen.emit.write import write
from moegen.errors import PlanError

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "backends" / "moegen_triton" / "kernels"
ALL: dict[str, Any] = {**SPECS, **ROUTED}
WIDE = {"fp64"}  # formats that kernels do not compute in
NAMES = sorted(n for n in ALL if "moe" in ALL[n]["model"] and n not in WIDE)


def built(name: str, which: str) -> Any:
    """A model from a package of a backend; policies in one layer, since kernels are slow here."""
    overrides = ["model.layers=1"] if name in ROUTED else []
    made = moegen.module(ALL[name], overrides, backend=which)
    return filled(made.Model)


def output(model: Any, name: str) -> Any:
    given = {key: torch.tensor([1]) for key in moegen.plan(ALL[name]).spec.model.given()}
    torch.manual_seed(3)
    chance = torch.Generator().manual_seed(1)
    return model(torch.randint(0, 61, (1, 8), generator=chance), **given)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_with_kernels_computes_what_one_without_does(name: str) -> None:
    plain, fused = built(name, "eager"), built(name, "triton")
    fused.load_state_dict(plain.state_dict())
    rough = 2e-2 if any(p.dtype == torch.bfloat16 for p in plain.parameters()) else 1e-4
    rough = 2e-2 if name == "mixed" else rough
    outs = [output(model, name) for model in (plain, fused)]
    for out in outs:
        loss = out.logits.float().square().mean() + sum(getattr(out, "losses", {}).values())
        loss.backward()
    expected, actual = (out.logits.float() for out in outs)
    scale = expected.abs().amax().item()
    torch.testing.assert_close(actual, expected, rtol=rough, atol=rough * scale)
    theirs = dict(fused.named_parameters())
    for key, parameter in plain.named_parameters():
        other = theirs[key].grad
        assert (parameter.grad is None) == (other is None), key
        if parameter.grad is not None and other is not None:
            error = (other.double() - parameter.grad.double()).norm()
            assert error <= 4 * rough * parameter.grad.double().norm() + 1e-9, key


@pytest.mark.parametrize("name", ["plain-moe", "deepseek-v3-like", "gpt-oss-like"])
def test_decoding_is_the_full_pass(name: str) -> None:
    model = built(name, "triton").eval()
    ids = torch.randint(0, 61, (1, 5))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(1, 5)
        steps = [model.step(ids[:, i : i + 1], torch.tensor([i]), cache) for i in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def files(name: str) -> dict[str, str]:
    plan = moegen.plan(ALL[name], sequence=16, backend="triton")
    return dict(package(plan, backend("triton")).files)


def test_kernels_are_copied_byte_for_byte_and_no_more_than_needed() -> None:
    made = files("plain-moe")
    copied = {n.partition("/")[2]: text for n, text in made.items() if n.startswith("kernels/")}
    for name, text in copied.items():
        assert text == (KERNELS / name).read_text(encoding="utf-8"), name
    assert "linear.py" not in copied  # of graphs whose experts are not one op
    assert {"router.py", "feed_forward.py", "dispatch.py", "__init__.py"} <= copied.keys()
    assert not [n for n in files("dense") if "router" in n or "feed_forward" in n]


def test_a_model_says_what_is_one_op() -> None:
    text = files("plain-moe")["model.py"]
    assert "logits, scores, experts, weights = route(" in text.replace(
        "_, scores", "logits, scores"
    )
    assert "out = routed_feed_forward(" in text
    assert "gather_rows" not in text
    ops = files("plain-moe")["ops.py"]
    assert "from .kernels.router import route\n" in ops


def test_emitted_code_is_clean_and_typed(tmp_path: Path) -> None:
    names = ["plain_moe", "gpt_oss_like", "expert_choice", "nested"]
    for name in names:
        plan = moegen.plan(ALL[name.replace("_", "-")], sequence=16, backend="triton")
        write(package(plan, backend("triton")), tmp_path / name, force=False)
    # Kernels are functions of Triton's language, which has no types.
    settings = "[mypy]\nstrict = true\n[mypy-triton.*]\nignore_missing_imports = true\n"
    loose = ("untyped_decorators", "untyped_defs", "incomplete_defs", "untyped_calls")
    settings += "[mypy-*.kernels.*]\n" + "".join(f"disallow_{key} = false\n" for key in loose)
    (tmp_path / "mypy.ini").write_text(settings)
    cache = str(ROOT / ".mypy_cache" / "emitted")
    for command in (
        ["ruff", "check", "--isolated", "."],
        ["ruff", "format", "--isolated", "--check", "."],
        ["mypy", "--cache-dir", cache, *names],
    ):
        line = [sys.executable, "-m", *command]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_changes_its_backend(tmp_path: Path) -> None:
    """What another backend left is gone; what is there is what the spec gives."""
    spec, folder = ROOT / "specs" / "tiny.yaml", tmp_path / "tiny"
    moegen.build(spec, folder, backend="triton")
    assert (folder / "kernels" / "up.py").is_file()
    assert check(folder) == []
    (folder / "kernels" / "up.py").write_text("")
    assert check(folder) == ["kernels/up.py differs from what the spec gives"]
    moegen.build(spec, folder, force=True)
    assert not (folder / "kernels").exists()
    assert check(folder) == []
    assert import_package(folder).Model


def test_a_forged_record_removes_nothing_elsewhere(tmp_path: Path) -> None:
    spec, folder = ROOT / "specs" / "tiny.yaml", tmp_path / "tiny"
    moegen.build(spec, folder)
    victim = tmp_path / "kernels" / "mine.txt"
    victim.parent.mkdir()
    victim.write_text("mine")
    record = (folder / "plan.json").read_text()
    for name in ("../kernels/mine.txt", "a/../../kernels/mine.txt", str(victim)):
        (folder / "plan.json").write_text(
            record.replace('"files": {', f'"files": {{"{name}": "x",')
        )
        moegen.build(spec, folder, force=True)
        assert victim.read_text() == "mine"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def test_wide_experts_are_permuted_and_it_is_said(tmp_path: Path) -> None:
    done = run(
        "build",
        str(ROOT / "specs/mixtral-8x7b.yaml"),
        *("-b", "triton"),
        *("--out", str(tmp_path / "a")),
    )
    assert "Experts 14,336 wide: rows are copied" in " ".join(done.output.split())
    assert "permute=True" in (tmp_path / "a" / "model.py").read_text()
    done = run(
        "build",
        str(ROOT / "specs/qwen3-30b-a3b.yaml"),
        *("-b", "triton"),
        *("--out", str(tmp_path / "b")),
    )
    assert "Experts 768 wide: kernels gather rows themselves" in " ".join(done.output.split())
    assert "permute" not in (tmp_path / "b" / "model.py").read_text()


def test_what_has_no_kernel_is_said_once_and_refused_if_strict(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    source = (ROOT / "specs" / "tiny.yaml").read_text()
    spec.write_text(source.replace("select: {kind: top_k, k: 2}", "select: expert_choice"))
    spec.write_text(spec.read_text().replace("      balance_bias: {rate: 0.001}\n", ""))
    spec.write_text(spec.read_text().replace("    losses: {balance: 0.01, z: 0.001}\n", ""))
    place = str(tmp_path / "out")
    done = run("build", str(spec), "-b", "triton", "--out", place)
    assert done.exit_code == 0
    assert done.output.count("there is no Triton kernel for combine_rows") == 1
    done = run("build", str(spec), "-b", "triton", "--out", str(tmp_path / "strict"), "--strict")
    assert done.exit_code == 2
    assert "there is no Triton kernel for combine_rows" in done.output
    assert not (tmp_path / "strict").exists()
    tiny = str(ROOT / "specs" / "tiny.yaml")
    assert run("build", tiny, "-b", "triton", "--out", place + "2", "--strict").exit_code == 0


def test_experts_that_are_not_one_op_are_said_once_and_refused_if_strict(tmp_path: Path) -> None:
    spec = str(ROOT / "specs" / "tiny.yaml")
    more = ("-b", "triton", "-o", "train.dropout.experts=0.1", "--out", str(tmp_path / "out"))
    done = run("build", spec, *more)
    assert done.exit_code == 0
    assert done.output.count("experts are not one op") == 1
    done = run("build", spec, *more, "--strict")
    assert done.exit_code == 2
    assert "without --strict it is built all the same" in " ".join(done.output.split())


def test_fp64_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match="no Triton kernels for fp64; use fp32, or -b eager"):
        moegen.plan(ALL["fp64"], backend="triton")


def test_show_and_estimate_tell_of_the_rewritten_graph() -> None:
    tiny = str(ROOT / "specs" / "tiny.yaml")
    shown = run("show", tiny, "moe", "-b", "triton").output
    shown = " ".join(shown.split())
    assert "route is one op in place of linear, softmax, add, top_k, gather, sum, truediv." in shown
    assert "out is one op in place of gather_rows, grouped_linear, chunk, swiglu, combine." in shown
    told = run("estimate", tiny, "-b", "triton").output
    assert "eager" in told
    assert "eager" not in run("estimate", tiny).output


def test_tuning_needs_a_gpu_and_a_package_with_kernels(tmp_path: Path) -> None:
    moegen.build(ROOT / "specs" / "tiny.yaml", tmp_path / "eager")
    done = run("tune", str(tmp_path / "eager"))
    assert done.exit_code == 2
    assert "the eager backend has nothing to tune" in done.output
    assert run("tune", str(tmp_path)).exit_code == 2
    if not torch.cuda.is_available():
        moegen.build(ROOT / "specs" / "tiny.yaml", tmp_path / "triton", backend="triton")
        done = run("tune", str(tmp_path / "triton"))
        assert done.exit_code == 2
        assert "measures kernels on a GPU" in done.output
