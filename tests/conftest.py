"""Options and fixtures of all tests."""

from __future__ import annotations

import os

# Triton's kernels run on CPU tensors in its interpreter; read where kernels are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Models of tests are so small that threads cost far more than they give.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden with what is emitted now",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
