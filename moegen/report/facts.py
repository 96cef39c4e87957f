"""An estimate as JSON: stable keys, integers exact.

Numbers that are means over tokens (FLOPs per token, cache bytes per token) are integers where
they are whole, and otherwise the nearest double.
"""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import Any

from moegen.errors import Problem, dotted
from moegen.estimator import Estimate, Flops, Memory, caches
from moegen.report.published import published

Facts = dict[str, Any]


def facts(made: Estimate) -> Facts:
    """All that `moegen estimate --json` tells of one spec."""
    work, counts = made.plan.workload, made.counts
    return {
        "name": made.plan.spec.name,
        "source": made.plan.spec.source,
        "workload": {
            "batch": work.batch,
            "sequence": work.sequence,
            "optimizer": made.optimizer,
            "checkpointing": made.checkpointing,
            "backend": made.backend,
        },
        "parameters": {
            "total": counts.total,
            "trained": counts.trained,
            "active": counts.active,
            "active_without_input_embedding": counts.active_without_input_embedding,
            "active_without_embeddings": counts.active_without_embeddings,
            "by_role": {role: asdict(share) for role, share in sorted(counts.by_role.items())},
            **({"by_task": made.by_task} if made.by_task else {}),
            "bytes": sum(made.weight_bytes.values()),
        },
        "buffers": counts.buffers,
        "published": _published(made),
        f"flops_per_{made.plan.spec.model.unit}": _flops(made),
        **{f"flops_per_{u.replace(' ', '_')}": _side(side) for u, side in made.sides.items()},
        "recurrent_steps": made.recurrent_steps,
        "cache": _cache(made),
        "training_memory": _memory(made.training),
        "inference_memory": _memory(made.inference),
        "eager_training_memory": _memory(made.beside.training) if made.beside else None,
        "eager_inference_memory": _memory(made.beside.inference) if made.beside else None,
        "gpu": _gpu(made),
        "warnings": [_warning(problem) for problem in made.plan.warnings],
    }


def number(value: Fraction) -> int | float:
    """An integer if it is one, else the nearest double."""
    return int(value) if value.denominator == 1 else float(value)


def _published(made: Estimate) -> Facts | None:
    found = published(made.plan.data, made.counts)
    if found is None:
        return None
    figures = {
        figure.name: {
            "printed": figure.printed,
            "counted": figure.counted,
            "convention": figure.convention,
            "agrees": figure.agrees,
        }
        for figure in found.figures
    }
    return {"total": None, "active": None, **figures, "note": found.note}


def _cache(made: Estimate) -> Facts | None:
    """None for models that do not decode."""
    if made.cache_bytes is None:
        return None
    each = made.cache_bytes_per_token
    parts = {name.replace(" ", "_"): held for name, (held, _) in caches(made.plan).items()}
    return {
        "bytes": made.cache_bytes,
        "bytes_per_token": None if each is None else number(each),
        **(parts if len(parts) > 1 else {}),
    }


def _flops(made: Estimate) -> Facts:
    return {
        "forward": number(made.forward_flops),
        "backward": number(made.training_flops - made.forward_flops),
        "training": number(made.training_flops),
        "decode": None if made.decode_flops is None else number(made.decode_flops),
        "by_role": {
            role: {"forward": number(flops.forward), "backward": number(flops.backward)}
            for role, flops in sorted(made.flops.items())
        },
    }


def _side(side: dict[str, Flops]) -> Facts:
    by_role = {
        role: {"forward": number(flops.forward), "backward": number(flops.backward)}
        for role, flops in sorted(side.items())
    }
    forward = number(sum((f.forward for f in side.values()), Fraction(0)))
    backward = number(sum((f.backward for f in side.values()), Fraction(0)))
    return {"forward": forward, "backward": backward, "by_role": by_role}


def _memory(memory: Memory) -> Facts:
    lines = [
        {"name": one.name, "bytes": one.bytes, "certainty": one.certainty, "note": one.note}
        for one in memory.lines
    ]
    return {"total": memory.total, "lines": lines}


def _warning(problem: Problem) -> Facts:
    mark = problem.mark
    place = {"file": mark.file, "line": mark.line} if mark else {"file": None, "line": None}
    return {"path": dotted(problem.path), "message": problem.message, **place}


def _rate(made: Estimate, seconds: float) -> Facts:
    """Units a second of a model that does not decode: images_per_second."""
    if made.decode_flops is not None:
        return {}
    model, work = made.plan.spec.model, made.plan.workload
    return {f"{model.unit}s_per_second": model.units(work.batch, work.sequence) / seconds}


def _gpu(made: Estimate) -> Facts | None:
    fit = made.fit
    if fit is None:
        return None
    return {
        "name": fit.gpu.name,
        "title": fit.gpu.title,
        "memory": fit.gpu.memory,
        "source": fit.gpu.source,
        "training_fits": fit.training,
        "inference_fits": fit.inference,
        "forward_seconds": fit.forward.total,
        "forward_chain_seconds": fit.forward.seconds,
        **_rate(made, fit.forward.total),
        "advice": list(fit.advice),
    }
