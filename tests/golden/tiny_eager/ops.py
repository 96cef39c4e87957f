"""The operations of this model: plain PyTorch, one function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Gradient = Callable[..., tuple[Tensor, ...]]


# Gradients of an activation's inputs, from that of its result and the inputs. Backward passes that
# compilers trace take these, since torch.func.vjp does not go with hooks of checkpoints.
_GRADIENTS: dict[Any, Gradient] = {
    F.relu: lambda grad, x: (grad.masked_fill(x <= 0, 0),),
    F.silu: lambda grad, x: (torch.ops.aten.silu_backward(grad, x),),
    F.gelu: lambda grad, x, **form: (torch.ops.aten.gelu_backward(grad, x, **form),),
}


def _gradient_of(activation: Callable[..., Tensor]) -> Callable[[Gradient], Gradient]:
    """Note the gradient of an activation."""

    def note(gradient: Gradient) -> Gradient:
        _GRADIENTS[activation] = gradient
        return gradient

    return note


def _pull(
    activation: partial[Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """An activation of inputs, and what makes gradients of these of that of the result."""
    known = _GRADIENTS.get(activation.func)
    if known is None:
        return torch.func.vjp(activation, *inputs)  # type: ignore[return-value]
    settings = activation.keywords
    return activation(*inputs), lambda grad: known(grad, *inputs, **settings)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape (Shazeer 2020, arXiv:2002.05202)."""
    return F.silu(gate) * up


@_gradient_of(swiglu)
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; approximate: none or tanh (Shazeer 2020)."""
    return F.gelu(gate, approximate=approximate) * up


@_gradient_of(geglu)
def _(
    grad: Tensor, gate: Tensor, up: Tensor, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    slope = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
    return slope, grad * F.gelu(gate, approximate=approximate)


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up (Shazeer 2020)."""
    return F.relu(gate) * up


@_gradient_of(reglu)
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * up).masked_fill(gate <= 0, 0), grad * F.relu(gate)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit) (gpt-oss)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@_gradient_of(clamped_swiglu)
def _(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float, alpha: float
) -> tuple[Tensor, Tensor]:
    low, inside = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = torch.sigmoid(low * alpha)
    slope = share * (1 + alpha * low * (1 - share))
    of_gate = (grad * (inside + 1) * slope).masked_fill(gate > limit, 0)
    return of_gate, (grad * (low * share)).masked_fill(up.abs() > limit, 0)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


@_gradient_of(relu2)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad * (2 * F.relu(x)),)


def cubic(x: Tensor) -> Tensor:
    """x^3 (Chen et al. 2022, arXiv:2208.02813)."""
    return x**3


@_gradient_of(cubic)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad * (3 * x**2),)


def identity(x: Tensor) -> Tensor:
    """x itself: linear experts, as those of hierarchical mixtures."""
    return x


@_gradient_of(identity)
def _(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad,)


def write_cache(cache: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write values [B, H, T, d] to cache [B, H, L, d] at positions [T], in place; the cache."""
    return cache.index_copy_(2, positions, values.to(cache.dtype))


def move_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load), in place; load [E] counts the step's choices."""
    counts = load.to(bias.dtype)
    with torch.no_grad():
        return bias.add_((counts.mean() - counts).sign(), alpha=rate)


def _define(
    name: str, kernel: Callable[..., Tensor], fake: Any, save: Any, backward: Any
) -> Any:
    """A torch.library op, which compile and export take whole.

    A process may hold several copies of this file, each in its own package: the first defines
    the op and the others use that one, so a change in meaning needs a change of name.
    """
    if not hasattr(torch.ops.moegen, name):
        definition = torch.library.custom_op(f"moegen::{name}", kernel, mutates_args=())
        definition.register_fake(fake)
        definition.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.moegen, name)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [N]; indices do not repeat, so the scatter is deterministic."""
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )


def _starts(order: Tensor, num_tokens: int) -> Tensor:
    """Where the choices of each token start among all N, K of them a token -> [T]."""
    return torch.arange(num_tokens, device=order.device) * (
        order.shape[0] // max(num_tokens, 1)
    )


def _sum_entries(
    rows: Tensor, entries: Tensor, starts: Tensor, weight: Tensor | None
) -> Tensor:
    """Weighted sums of rows[entries] over the runs that begin at starts, fused, without atomics."""
    return F.embedding_bag(entries, rows, starts, mode="sum", per_sample_weights=weight)


def _aligned(x: Tensor) -> Tensor:
    """The matrices x [..., r, c] as grouped_mm reads them: strides of one and of whole 16 bytes."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return _aligned(x.transpose(-1, -2)).transpose(-1, -2)
    step, width = 16 // x.element_size(), x.shape[-1]
    whole = (
        all(stride % step == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    )
    if whole and x.stride(-1) == 1 and x.stride(-2) >= width:
        return x
    padded = x.new_zeros(*x.shape[:-1], -(-width // step) * step)
    return padded.narrow(-1, 0, width).copy_(x)


def _zero_tail(rows: Tensor, ends: Tensor) -> Tensor:
    """Zeros, in place, for the rows [N, n] of no expert, which grouped_mm leaves uninitialised."""
    if rows.device.type == "cpu":
        rows[int(ends[-1]) :] = 0
        return rows
    row = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill_(
        (row >= ends[-1]).unsqueeze(-1), 0
    )  # ends stays on the device


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every expert, for float64, which grouped_mm lacks: it checks, not trains."""
    stops = ends.tolist()
    return list(zip([0, *stops], stops, strict=False))


def _grouped_linear_kernel(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, d] of expert e times weight[e].T -> [N, n]."""
    if rows.shape[0] == 0 or rows.dtype == torch.float64:
        out = rows.new_zeros(rows.shape[0], weight.shape[1])
        for matrix, (start, end) in zip(weight, _spans(ends), strict=True):
            torch.mm(rows[start:end], matrix.t(), out=out[start:end])
        return out
    out = F.grouped_mm(_aligned(rows), _aligned(weight).transpose(1, 2), offs=ends)
    return _zero_tail(out.contiguous(), ends)  # CUDA pads odd widths


def _grouped_outer_kernel(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [N, n] transposed times right [N, d], within each expert -> [E, n, d]."""
    if left.shape[0] == 0 or left.dtype == torch.float64:
        out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
        for matrix, (start, end) in zip(out, _spans(ends), strict=True):
            torch.mm(left[start:end].t(), right[start:end], out=matrix)
        return out
    return F.grouped_mm(_aligned(left).t(), _aligned(right), offs=ends).contiguous()


def _grouped_linear_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    wants_rows, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_linear(grad, weight.transpose(1, 2), ends) if wants_rows else None,
        _grouped_outer(grad, rows, ends) if wants_weight else None,
        None,
    )


def _grouped_outer_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, ends = ctx.saved_tensors
    wants_left, wants_right, _ = ctx.needs_input_grad
    return (
        _grouped_linear(right, grad, ends) if wants_left else None,
        _grouped_linear(left, grad.transpose(1, 2), ends) if wants_right else None,
        None,
    )


_grouped_linear = _define(
    "grouped_linear",
    _grouped_linear_kernel,
    _grouped_linear_fake,
    _save_inputs,
    _grouped_linear_backward,
)


_grouped_outer = _define(
    "grouped_outer",
    _grouped_outer_kernel,
    _grouped_outer_fake,
    _save_inputs,
    _grouped_outer_backward,
)


class _Layer(NamedTuple):
    """Experts and what they work on: the activation takes two halves if up has rows for both.

    owner [N] is the token of each row, None where tokens are the rows; share [N, 1] what a row has
    of its token's gradient, None for all of it.
    """

    activation: partial[Tensor]
    tokens: Tensor
    owner: Tensor | None
    share: Tensor | None
    ends: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def halves(self, hidden: Tensor) -> tuple[Tensor, ...]:
        gated = self.up.shape[1] != self.down.shape[2]
        return hidden.chunk(2, -1) if gated else (hidden,)


class _FeedForward(torch.autograd.Function):
    """Gathers rows, applies both products with the activation between, and sums rows by weight.

    Rows and activations are computed again in the backward pass, and nothing of the second
    product is kept: the gradient of a weight follows from the gradient of its row's activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: partial[Tensor],
        keep: bool,
        tokens: Tensor,
        order: Tensor | None,
        weights: Tensor | None,
        ends: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        owner = None if order is None else _owners(tokens, order)
        layer = _Layer(activation, tokens, owner, None, ends, *parameters)  # type: ignore[arg-type]
        out, hidden = _outputs(layer, keep)
        ctx.activation = activation
        ctx.save_for_backward(tokens, order, weights, ends, hidden, *parameters)
        if order is None or weights is None:
            return out
        starts = _starts(order, tokens.shape[0])
        shares = weights.to(out.dtype).flatten()
        return _sum_entries(out, _inverse(order), starts, shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("experts as one op have no gradient of their gradient")
        tokens, order, weights, ends, hidden, *parameters = ctx.saved_tensors
        owner, share = None, None
        if order is not None:
            owner = _owners(tokens, order)
            share = weights.to(grad.dtype).flatten().index_select(0, order)
            share = share.unsqueeze(-1)
        layer = _Layer(ctx.activation, tokens, owner, share, ends, *parameters)
        needs = zip(_INPUTS, ctx.needs_input_grad[2:], strict=True)
        wanted = [name for name, needed in needs if needed]
        grad = grad.contiguous()
        found = _gradients(layer, hidden, grad, wanted)
        if "tokens" in found:
            found["tokens"] = _sum_tokens(found["tokens"], order, tokens.shape[0])
        if "weights" in found:
            found["weights"] = _by_choice(found["weights"], order, weights)
        return None, None, *(found.get(name) for name in _INPUTS)


_INPUTS = (
    *("tokens", "order", "weights", "ends"),
    *("up", "down", "up_bias", "down_bias"),
)


def _outputs(layer: _Layer, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The output of every row [N, d], and the first product [N, 2n] if it is to be kept."""
    rows = _rows(layer.tokens, layer.owner)
    hidden = _project(rows, layer.up, layer.up_bias, layer.ends)
    active = layer.activation(*layer.halves(hidden))
    out = _project(active, layer.down, layer.down_bias, layer.ends)
    return out, hidden if keep else None


def _gradients(
    layer: _Layer, hidden: Tensor | None, grad: Tensor, wanted: list[str]
) -> dict[str, Tensor]:
    """Gradients by name: of parameters, and row by row of tokens [N, d] and weights [N].

    hidden [N, 2n] is the first product if it was kept, grad the gradient of tokens' outputs.
    """
    tokens, owner, share, ends = layer.tokens, layer.owner, layer.share, layer.ends
    up, down, up_bias, down_bias = layer.up, layer.down, layer.up_bias, layer.down_bias
    rows, grad = _rows(tokens, owner), _rows(grad, owner)
    if hidden is None:
        hidden = _project(rows, up, up_bias, ends)
    found: dict[str, Tensor] = {}
    active, pull = _pull(layer.activation, layer.halves(hidden))
    back = _grouped_linear(grad, down.transpose(1, 2), ends)
    ones = grad.new_ones(grad.shape[0], 1)
    if "weights" in wanted:
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_row = (back * active).sum(-1, dtype=wide)
        if down_bias is not None:
            of_bias = grad * _of_rows(down_bias, grad, ends)
            of_row = of_row + of_bias.sum(-1, dtype=wide)
        found["weights"] = of_row
    if share is not None:
        back, active = back * share, active * share
    if "down" in wanted:
        found["down"] = _grouped_outer(grad, active, ends)
    if "down_bias" in wanted:
        part = ones if share is None else share
        found["down_bias"] = _grouped_outer(grad, part, ends).squeeze(-1)
    halves = pull(back)
    back = halves[0] if len(halves) == 1 else torch.cat(halves, -1)
    if "up" in wanted:
        found["up"] = _grouped_outer(back, rows, ends)
    if "up_bias" in wanted:
        found["up_bias"] = _grouped_outer(back, ones, ends).squeeze(-1)
    if "tokens" in wanted:
        found["tokens"] = _grouped_linear(back, up.transpose(1, 2), ends)
    return found


def _owners(tokens: Tensor, order: Tensor) -> Tensor:
    """The token of every row [N]."""
    k = order.shape[0] // max(tokens.shape[0], 1)
    return order // max(k, 1)


def _rows(tokens: Tensor, owner: Tensor | None) -> Tensor:
    """The token of every row, or the rows themselves where no owner is given."""
    return tokens if owner is None else tokens.index_select(0, owner)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    out: Tensor = _grouped_linear(rows, weight, ends)
    return out if bias is None else out + _of_rows(bias, out, ends)


def _of_rows(bias: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The bias of each row's expert, [N, n]; zero for rows of no expert."""
    row = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, row, right=True)
    return F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)


def _by_choice(of_row: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Values of rows [N] where their choices are, in the shape and format of weights [T, K]."""
    placed = torch.empty_like(of_row).scatter_(0, order, of_row)
    return placed.view(weights.shape).to(weights.dtype)


def _sum_tokens(rows: Tensor, order: Tensor | None, num_tokens: int) -> Tensor:
    if order is None:
        return rows
    return _sum_entries(rows, _inverse(order), _starts(order, num_tokens), None)


def _run(
    tokens: Tensor,
    order: Tensor | None,
    weights: Tensor | None,
    ends: Tensor,
    parameters: tuple[Tensor | None, ...],
    activation: partial[Tensor],
    recompute: bool,
) -> Tensor:
    """In the format of the parameters, or of autocast."""
    kind = tokens.device.type
    dtype = parameters[0].dtype if parameters[0] is not None else tokens.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    cast = (p if p is None else p.to(dtype) for p in parameters)
    keep = torch.is_grad_enabled() and not recompute
    return _FeedForward.apply(  # type: ignore[no-any-return, no-untyped-call]
        activation, keep, tokens.to(dtype), order, weights, ends, *cast
    )


def routed_feed_forward(
    tokens: Tensor,
    order: Tensor,
    weights: Tensor,
    ends: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Callable[..., Tensor],
    recompute: bool = False,
    permute: bool = False,
    **settings: Any,
) -> Tensor:
    """Every token's experts, summed by weight: tokens [T, d], weights [T, K] -> [T, d].

    up [E, 2n, d], gates first, or [E, n, d] where the activation takes one tensor; down
    [E, d, n]; biases [E, 2n] or [E, n], and [E, d]; settings go to the activation. Backward keeps
    tokens and the first product [N, 2n], or with `recompute` tokens alone. Choices of no expert
    (rows from ends[-1] on) add nothing and get no gradient. Rows are copied into their order, so
    `permute`, which asks for that, changes nothing.
    """
    apply = partial(activation, **settings)
    parameters = (up, down, up_bias, down_bias)
    return _run(tokens, order, weights, ends, parameters, apply, recompute)


def entropy(probability: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, 0 ln 0 being 0, in nats."""
    positive = torch.where(probability > 0, probability, 1)
    return -(probability * positive.log()).sum(-1)


def router_entropy(scores: Tensor, valid: Tensor) -> Tensor:
    """Mean entropy of a real token's scores [T, E], brought to sum to one; a statistic."""
    scores = scores.detach()
    tiny = torch.finfo(scores.dtype).tiny
    share = scores / scores.sum(-1, keepdim=True).clamp(min=tiny)
    return masked_mean(entropy(share), valid)


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which of ids [B, S] are real, bool [B * S]; all of them if there is no mask."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool).flatten()
    return mask.bool().flatten()


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [T, ...] over the tokens where valid [T] is true; 0 if there is none."""
    values = values if values.is_floating_point() else values.float()
    kept = valid.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return (values * kept).sum(0) / kept.sum().clamp(min=1)


def choice_fractions(load: Tensor, choices: int) -> Tensor:
    """load [E] as fractions of tokens: they sum to the number of choices a token has."""
    return load / (load.sum() / choices).clamp(min=1)


def balance_loss(fraction: Tensor, probability: Tensor) -> Tensor:
    """E * sum of fraction * probability [E] (GShard 2020, Switch 2021); gradient by the latter."""
    return fraction.shape[0] * (fraction.detach() * probability).sum()


def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean squared log-partition of logits [T, E] over real tokens (ST-MoE 2022)."""
    return masked_mean(torch.logsumexp(logits, -1).square(), valid)


def sum_over_layers(routing: Sequence[Any], name: str) -> Tensor:
    """The sum of one auxiliary loss over the routed layers that have it."""
    return torch.stack([r.losses[name] for r in routing if name in r.losses]).sum()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, S, V] at labels [B, S], in fp32; label -100 is left out.

    The logits at a position are held against the label of the next one.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)


def rope_frequencies(dim: int, theta: float, factor: float = 1.0) -> Tensor:
    """Angles per position, [dim / 2]: theta^(-2i/dim), divided by `factor` (linear scaling)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponents) / factor


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r/2) of x [..., S, r] by the angles of cos and sin [S, r/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _keys(experts: Tensor, num_experts: int) -> Tensor:
    """Expert numbers in the narrowest type that holds them, since radix sorts pay per byte."""
    return experts.to(torch.int16 if num_experts < 2**15 else torch.int32)


def _ends(sorted_keys: Tensor, num_experts: int) -> Tensor:
    """Where each expert's run ends among sorted keys [N] -> [E] int32."""
    experts = torch.arange(
        num_experts, dtype=sorted_keys.dtype, device=sorted_keys.device
    )
    return torch.searchsorted(sorted_keys, experts, right=True, out_int32=True)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Group choices by expert, in token order: [T, K] -> order [N] int64, ends [E] int32.

    Row i is choice order[i] of the flattened choices, so of token order[i] // K. Choices of
    "expert" num_experts are routed nowhere: their rows come last, from ends[-1] on.
    """
    keys, order = torch.sort(_keys(experts, num_experts).flatten(), stable=True)
    return order, _ends(keys, num_experts)


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k best-scored experts, best first, ties to the lowest index: [T, E] -> [T, k] int64."""
    scores = scores.detach()
    if scores.dtype == torch.float64:  # too wide to share an int64 with its index
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        return best.contiguous()  # a view would keep the indices of all experts
    # torch.topk breaks ties as it likes, so make ties impossible: the order-preserving bits of the
    # score above, the index counted from the end below. Negative floats grow downwards in their
    # bits, which the xor turns around, and -0.0 must tie with 0.0.
    scores = scores.float()
    bits = scores.view(torch.int32)
    high = (
        (bits >> 31)
        .bitwise_and_(0x7FFFFFFF)
        .bitwise_xor_(bits)
        .masked_fill_(scores == 0, 0)
    )
    low = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return torch.topk(
        high.long().bitwise_left_shift_(32).bitwise_or_(low), k, dim=-1
    ).indices


def expert_load(experts: Tensor, num_experts: int, valid: Tensor) -> Tensor:
    """Choices per expert, of valid tokens only: [T, K], valid [T] bool -> [E] int64.

    Integer sums are exact in any order, so scattering is deterministic here; bincount would
    make the shape depend on the data.
    """
    counted = valid.unsqueeze(-1).expand(experts.shape).flatten().long()
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(0, experts.flatten(), counted)[:num_experts]
