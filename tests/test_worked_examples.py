"""Worked cases of what examples compute beside their models: data, moments, measures."""

from __future__ import annotations

import numpy as np
import torch
from worked_numbers import Case, worked

from examples.data.synthetic import task_label, task_weights
from examples.gaussian_processes import log_density, moments, responsibilities
from examples.harness.metrics import dispatch_entropy


@worked("mmoe-synthetic-data")
def test_labels_of_mmoe(case: Case) -> None:
    u1, u2, x = case["u1"], case["u2"], case["x"]
    one, two = task_weights(u1, u2, case.inputs["c"], case.inputs["p"])
    case.holds(w1=one, w2=two, cosine=torch.cosine_similarity(one, two, 0))
    y1, y2 = (task_label(x, w, case["alpha"], case["beta"]) for w in (one, two))
    case.holds(y1_noiseless=y1, y2_noiseless=y2)


@worked("gp-mixture-moments")
def test_moments_of_a_mixture_of_processes(case: Case) -> None:
    experts = [np.array([case.inputs[name]]) for name in ("gate", "mean", "variance")]
    y = np.array([case.inputs["y"]])
    mean, variance = moments(*experts)
    case.holds(mean=mean.item(), variance=variance.item())
    case.holds(density=np.exp(log_density(*experts, y)).item())
    case.holds(responsibility=responsibilities(*experts, y)[0].tolist())


@worked("chen2022-dispatch-entropy")
def test_entropy_of_clusters_inside_experts(case: Case) -> None:
    counts = case["dispatch_cluster_by_expert"].T
    uniform = dispatch_entropy(torch.full_like(counts, 25))
    case.holds(entropy=dispatch_entropy(counts), uniform=uniform)
