"""Every worked case of the reference is run through emitted code, or left out for a reason."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

from worked_numbers import BESIDE, CASES, COVERED

HERE = Path(__file__).parent

CALL = "arithmetic of a paper, not of a layer"
AFTER = "changes a trained model; nothing that is emitted does"
DEVICES = "execution on several devices; emitted models are for one"
SERVING = "a policy of serving, outside the model"
COUNTED = "parameters are held against the authors' models in test_specs.py"

LEFT_OUT: dict[str, str] = {
    "gshard-top2-importance": "importance of tokens for the inner level of Mesh-TensorFlow's 2-D "
    "layer; routers inside experts here judge rows by their logits alone",
    "fastmoe-switch-loss-quirk": "a fault of FastMoE: fractions and means are divided by survivors",
    "group-splitting": "a spec says how large a group is; which size divides a batch is for those "
    "who make batches",
    "switch-distillation-loss": AFTER,
    "fine-grained-combinatorics": CALL,
    "mixtral-parameter-count": COUNTED,
    "model-parameter-counts": COUNTED,
    "chen2022-double-softmax-floor": "a fault of the paper's notebooks: two softmaxes in a row",
    "task-moe-subnetwork": AFTER,
    "expert-merging": AFTER,
    "qmoe-ternary-rtn": AFTER,
    "qmoe-codebook": AFTER,
    "qmoe-gptq-3col": AFTER,
    "distill-init-from-teacher": AFTER,
    "expert-parallel-all-to-all": DEVICES,
    "fastermoe-shadowing": DEVICES,
    "fastermoe-shadowing-one-hot": DEVICES,
    "fastermoe-shadowing-none": DEVICES,
    "fastermoe-topology-gate": DEVICES,
    "fastermoe-topology-gate-below": DEVICES,
    "all-to-all-volume": DEVICES,
    "expert-placement": DEVICES,
    "parallelism-weights-per-device": DEVICES,
    "grad-norm-with-experts": DEVICES,
    "shazeer-effective-batch": DEVICES,
    "speculative-sampling-step": SERVING,
    "speculative-expected-tokens": SERVING,
    "speculative-greedy": SERVING,
    "expert-offload-lru": SERVING,
    "gpt4-rumor-arithmetic": CALL,
    "mixtral-active-arithmetic-folklore": CALL,
}


def registered() -> dict[str, object]:
    """The tests of all files, by case."""
    for path in HERE.glob("test_worked_*.py"):
        importlib.import_module(path.stem)
    return dict(COVERED)


def test_every_case_is_run_or_left_out() -> None:
    covered = registered()
    assert not set(covered) & set(LEFT_OUT)
    assert set(covered) | set(LEFT_OUT) == set(CASES)
    assert len(CASES) == 153
    assert all(LEFT_OUT.values())


def test_values_that_are_not_checked_are_of_their_cases_and_have_reasons() -> None:
    registered()
    for name, beside in BESIDE.items():
        expected = CASES[name]["expected"]
        assert set(beside) < set(expected), name
        assert all(beside.values())


def test_the_cases_are_those_of_the_reference() -> None:
    text = (HERE / "data" / "golden.json").read_bytes()
    known = "21832041b2cd64a673980dc740c0984af4978f9f8dda2323d41a4e81be8cc274"
    assert hashlib.sha256(text).hexdigest() == known
