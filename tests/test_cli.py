"""Every command as a user types it: what it prints, its JSON, its exit codes, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import moegen
from moegen.cli import cli
from moegen.gpus import GPUS
from moegen.optimizers import OPTIMIZERS
from moegen.plugins import load_installed
from moegen.report.numbers import count, exact, flops, parameters, seconds, size, work
from moegen.report.published import agrees
from moegen.report.schema import schema_text

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "specs" / "tiny.yaml")


def run(*arguments: str, code: int = 0, width: int = 100, **env: str) -> Result:
    result = CliRunner().invoke(cli, arguments, env={"COLUMNS": str(width), **env})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output or "--traceback" in arguments
    return result


def facts(*arguments: str) -> dict[str, Any]:
    found = json.loads(run("estimate", TINY, "--json", *arguments).stdout)
    assert isinstance(found, dict)
    return found


# Without torch


@pytest.mark.parametrize("argument", ["--help", "--version", "estimate --help", "show -h"])
def test_help_needs_no_torch(argument: str) -> None:
    code = (
        "import sys; from moegen.cli import cli; "
        f"cli({argument.split()!r}, standalone_mode=False); "
        "print(sorted({'torch', 'pydantic', 'numpy', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_moegen_is_the_command() -> None:
    command = [sys.executable, "-m", "moegen", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"moegen, version {moegen.__version__}\n"


def test_a_misspelt_command_is_a_usage_error() -> None:
    assert "build" in run("buidl", TINY, code=2).stderr


# Estimates


def test_json_is_exact_and_has_these_keys() -> None:
    found = facts()
    assert list(found) == [
        "name",
        "source",
        "workload",
        "parameters",
        "buffers",
        "published",
        "flops_per_token",
        "recurrent_steps",
        "cache",
        "training_memory",
        "inference_memory",
        "eager_training_memory",
        "eager_inference_memory",
        "gpu",
        "warnings",
    ]
    made = moegen.estimate(TINY)
    numbers = found["parameters"]
    assert (
        numbers["total"]
        == made.counts.total
        == sum(role["count"] for role in numbers["by_role"].values())
    )
    assert numbers["active"] == made.counts.active
    assert found["flops_per_token"]["training"] == made.training_flops
    assert found["flops_per_token"]["decode"] == made.decode_flops
    assert found["training_memory"]["total"] == made.training.total
    assert found["cache"] == {"bytes": made.cache_bytes, "bytes_per_token": 2048}
    assert found["gpu"] is None


def test_the_total_is_that_of_the_emitted_model(tmp_path: Path) -> None:
    run("build", TINY, "--out", str(tmp_path / "tiny"))
    model = moegen.api.import_package(tmp_path / "tiny").Model()
    assert sum(p.numel() for p in model.parameters()) == facts()["parameters"]["total"]
    held = sum(b.numel() for n, b in model.named_buffers() if n in model.state_dict())
    assert held == facts()["buffers"]


@pytest.mark.parametrize("width", [80, 120])
def test_estimates_keep_to_the_width(width: int) -> None:
    text = run("estimate", TINY, "--gpu", "h100", "--batch", "64", width=width).stdout
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    for part in (
        "tiny: 2,923,904 parameters (2.924 M), 859.5 K active for a token",
        "routed experts",
        "without the input embedding",
        "adamw-mixed",
        "1 GB = 10^9 bytes",
        "One H100 80 GB SXM: 85.90 GB",
        "fits",
    ):
        assert part in text


def test_what_does_not_fit_comes_with_advice() -> None:
    text = run("estimate", TINY, "--gpu", "l4", "--batch", "4096").stdout
    assert "lacks" in text
    assert "--checkpointing" in text


def test_workload_options_reach_the_estimate() -> None:
    found = facts("--batch", "2", "--sequence", "64", "--optimizer", "sgd", "--checkpointing")
    assert found["workload"] == {
        "batch": 2,
        "sequence": 64,
        "optimizer": "sgd",
        "checkpointing": True,
        "backend": "eager",
    }
    assert "more than its max_sequence" in run("estimate", TINY, "--sequence", "512").stdout


def test_published_figures_stand_beside_the_counts(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    text = (
        Path(TINY)
        .read_text()
        .replace("model:", "published: {total: 2.9M, active: 700K, note: Made up.}\nmodel:", 1)
    )
    spec.write_text(text)
    shown = run("estimate", str(spec)).stdout
    assert "agrees to its digits" in shown
    assert "differs, without embedding and head" in shown
    assert "Made up." in shown
    found = json.loads(run("estimate", str(spec), "--json").stdout)["published"]
    assert found["total"] == {
        "printed": "2.9M",
        "counted": 2923904,
        "convention": None,
        "agrees": True,
    }
    assert found["active"]["convention"] == "active_without_embeddings"
    assert not found["active"]["agrees"]


def test_a_sweep_has_a_row_for_each_combination() -> None:
    options = ("-o", "moe.experts.count=8,16", "-o", "moe.shared=1,2,3")
    text = run("estimate", TINY, *options, "--gpu", "l4", width=80).stdout
    rows = [line.split() for line in text.splitlines() if " GB " in line and "yes" in line]
    assert [row[:2] for row in rows] == [[e, s] for e in ("8", "16") for s in ("1", "2", "3")]
    assert max(map(len, text.splitlines())) <= 80
    found = facts(*options)["combinations"]
    assert len(found) == 6
    assert found[3]["overrides"] == {"moe.experts.count": "16", "moe.shared": "1"}
    assert found[3]["estimate"] == facts()


def test_a_sweep_says_what_is_invalid_before_it_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("moegen.api.estimate", never)
    text = run("estimate", TINY, "-o", "moe.experts.count=8,zero", code=2).stderr
    assert "zero" in text


# Packages


def test_build_says_what_it_wrote_and_check_agrees(tmp_path: Path) -> None:
    out = tmp_path / "model"
    text = run("build", TINY, "--out", str(out), "-o", "moe.experts.count=8", width=200).stdout
    assert "1,741" in text
    assert "7 classes" in text
    assert "from model import Model" in text
    lines = len((out / "model.py").read_text().splitlines())
    assert ["model.py", str(lines)] in [line.split()[:2] for line in text.splitlines()]
    assert "is what its spec.yaml gives" in run("check", str(out)).stdout


def test_the_next_step_runs(tmp_path: Path) -> None:
    text = run("build", TINY, "--out", str(tmp_path / "model"), width=200).stdout
    line = next(line for line in text.splitlines() if "python -c" in line).strip()
    folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("Model(")


def test_an_extended_spec_is_built_faithfully(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"extends: [{TINY}]\nname: more\nmodel: {{moe: {{shared: 2}}}}\n")
    run("build", str(spec), "--out", str(tmp_path / "more"))
    run("check", str(tmp_path / "more"))


def test_edited_files_are_told_and_kept(tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    run("build", TINY, "--out", out)
    with (tmp_path / "model" / "model.py").open("a") as file:
        file.write("# mine\n")
    (tmp_path / "model" / "ops.py").unlink()
    found = run("check", out, code=1).stdout.splitlines()
    assert found == [
        f"{out}: model.py differs from what the spec gives",
        f"{out}: ops.py is missing",
    ]
    refused = run("build", TINY, "--out", out, code=2).stderr
    assert "model.py" in refused
    assert "--force" in refused
    assert "# mine" in (tmp_path / "model" / "model.py").read_text()
    run("build", TINY, "--out", out, "--force")
    run("check", out)


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    assert "plan.json" in run("check", str(tmp_path), code=2).stderr


def test_lists() -> None:
    assert "plain PyTorch" in run("backends").stdout
    assert "nothing" in run("backends", TINY).stdout


def test_specs_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "tiny.yaml").write_text(Path(TINY).read_text())
    monkeypatch.chdir(tmp_path)
    (counted,) = json.loads(run("specs", "--count", "--json").stdout)
    assert counted | {"total": "2.924 M", "active": "859.5 K", "kind": "decoder"} == counted
    assert "tiny" in run("specs").stdout
    assert "others" in run("specs", "others").stdout
    assert "others" in run("specs", "mixtrall", code=2).stderr


def test_the_schema_in_the_repository_is_current(tmp_path: Path) -> None:
    load_installed()
    committed = (ROOT / "specs" / "moegen.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run: moegen schema --out specs/moegen.schema.json"
    run("schema", "--out", str(tmp_path / "schema.json"))
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == committed
    assert run("schema").stdout == committed


# Errors


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("estimate", TINY, "--gpu", "h10"), ("no GPU is called 'h10'", "'h100'", *GPUS)),
        (("estimate", TINY, "--optimizer", "adamv"), ("'adamw'", *OPTIMIZERS)),
        (("show", TINY, "moe", "--program", "forwards"), ("'forward'", "step")),
        (("show", TINY, "mo"), ("did you mean", "moe", "Attention")),
        (("build", TINY, "-b", "eagre"), ("'eager'",)),
        (("estimate", TINY, "-o", "moe.exprts=8"), ("'experts'", "-o:1:1")),
        (("estimate", "nowhere.yaml"), ("nowhere.yaml",)),
        (("schema", "--out", "/nowhere/schema.json"), ("cannot write",)),
        (("--import", "nowhere.py", "specs"), ("nowhere.py",)),
        (("estimate", TINY, "--batch", "0"), ("--batch",)),
    ],
)
def test_wrong_input_is_explained_with_exit_code_2(
    arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert all(part in result.stderr for part in parts), result.stderr


def test_a_fault_of_moegen_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a wheel came off\nand rolled away")

    monkeypatch.setattr("moegen.api.load", broken)
    text = run("estimate", TINY, code=1).stderr
    assert text.splitlines()[0] == "moegen failed: RuntimeError: a wheel came off"
    assert "--traceback" in text
    assert "in broken" in run("--traceback", "estimate", TINY, code=1).stderr
    found = CliRunner().invoke(cli, ["estimate", TINY], env={"MOEGEN_TRACEBACK": "1"})
    assert "in broken" in found.stderr


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moegen.api.load", stop)
    assert run("estimate", TINY, code=130).stderr == "interrupted\n"


# Numbers


def test_numbers_are_exact_and_short() -> None:
    assert parameters(671026404352) == "671,026,404,352 parameters (671.0 B)"
    assert parameters(48) == "48 parameters"
    assert [count(n) for n in (0, 999, 1000, 9999, 99_996, 999_949, 999_950)] == [
        "0",
        "999",
        "1.000 K",
        "9.999 K",
        "100.0 K",
        "999.9 K",
        "1.000 M",
    ]
    assert size(1024**3) == "1.074 GB"
    assert flops(0) == "0"
    assert work(142_800_000_000) == "142.8 GFLOPs"
    assert exact(1234.5) == "1,234.5"
    times = [seconds(t) for t in (4e-5, 0.0123, 1.5, 3330.0)]
    assert times == ["40 us", "12.3 ms", "1.5 s", "3,330 s"]


@pytest.mark.parametrize(
    ("printed", "value", "verdict"),
    [
        ("46.7B", 46_702_792_704, True),
        ("47.0B", 46_702_792_704, False),
        ("671B", 671_026_404_352, True),
        ("280B", 277_000_000_000, True),
        ("3.3B", 3_353_032_704, False),
        ("2923904", 2_923_904, True),
        ("many", 2_923_904, False),
    ],
)
def test_figures_agree_to_their_digits(printed: str, value: int, verdict: bool) -> None:
    assert agrees(printed, value) is verdict
