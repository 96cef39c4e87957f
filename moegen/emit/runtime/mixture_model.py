"""What a mixture on vectors can do beside its network: train, predict, and fit itself by EM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .network import Network


class MixtureModel(Network):
    """Base of a model that has `forward`, `loss`, `pool` and `likelihood`."""

    def loss(self, *inputs: Any) -> Tensor:
        """The mean loss of outputs, targets, and gates where experts are apart."""
        raise NotImplementedError

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        """ln P(target) given each expert [B, E], but for a constant."""
        raise NotImplementedError

    def posteriors(self, outputs: Tensor, target: Tensor, gates: Tensor) -> Tensor:
        """How likely each expert made the target, [B, E]."""
        raise NotImplementedError

    def likelihood(self, *inputs: Any) -> Tensor:
        """The log-likelihood of each target, [B]."""
        raise NotImplementedError

    def pool(self, *inputs: Any) -> Tensor:
        """Predictions of outputs, and gates where experts are apart."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Any:
        """Examples x [B, d], or of patches [B, P, d], to an Output."""
        return super().__call__(x)

    def training_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """The loss of targets y for examples x, with auxiliary losses, and the Output itself."""
        output = self(x)
        return self.total_loss(
            self.loss(output.outputs, y, *_gates(output)), output
        ), output

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Values [B, n], or probabilities: of yes [B, 1], or of each class [B, C]."""
        output = self(x)
        return self.pool(output.outputs, *_gates(output))

    def classify(self, x: Tensor) -> Tensor:
        """The class of each example, [B]; whether it is yes where there are no classes."""
        predicted = self.predict(x)
        if predicted.shape[-1] == 1:
            return predicted.squeeze(-1) > 0.5
        return predicted.argmax(-1)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """ln P(y | x) of each example, [B]."""
        output = self(x)
        return self.likelihood(output.outputs, y, *_gates(output))

    def posterior(self, x: Tensor, y: Tensor) -> Tensor:
        """How likely each expert made y, [B, E]; they sum to one (the E-step of EM)."""
        output = self(x)
        gates = _gates(output)
        if not gates:
            raise TypeError("experts are mixed in this model, so none has a posterior")
        return self.posteriors(output.outputs, y, *gates)

    # Policies of training

    def checkpoint_layers(self, every: int = 1) -> None:
        """Recompute every so many layers in the backward pass; none with a margin can be."""
        layers: Any = getattr(self, "layers", [])
        if any(hasattr(layer, "margin") for layer in layers):
            raise TypeError(
                "a layer with a margin counts its gates, so it runs only once"
            )
        super().checkpoint_layers(every)
        for layer in list(layers)[::every]:
            if hasattr(layer, "apart"):
                layer.apart = partial(checkpoint, layer.apart, use_reentrant=False)

    def drop_constraint(self) -> None:
        """Let gates be as they are from now on: the fine-tuning after constrained training."""
        for module in self.modules():
            if isinstance(margin := getattr(module, "margin", None), Tensor):
                margin.fill_(torch.inf)

    def anneal(self, step: int) -> None:
        """Let layers choose as many experts an example as their schedules have at a step."""
        for module in self.modules():
            if isinstance(plan := getattr(module, "annealing", None), Tensor):
                start, k, steps = plan.tolist()
                now: Any = module.current_k
                now.fill_(round(start + (k - start) * min(1.0, step / steps)))

    @torch.no_grad()
    def normalise_gradients(
        self, norm: Literal["frobenius", "sum"] = "frobenius"
    ) -> None:
        """Divide each expert's gradient by its norm, for a step of descent (Chen et al. 2022).

        frobenius: of all its parameters together, as the paper has it; sum: the sum of its
        parameters' norms, as the paper's code has it.
        """
        for own in self._expert_gradients():
            norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in own])
            total = norms.sum(0) if norm == "sum" else norms.norm(dim=0)
            total = torch.where(total > 0, total, 1)
            for grad in own:
                grad.div_(total.view(-1, *[1] * (grad.dim() - 1)))

    def _expert_gradients(self) -> list[list[Tensor]]:
        """Gradients [E, ...] of experts of one shape, for each shape of each layer."""
        groups: dict[tuple[str, int], list[Tensor]] = {}
        parts = [part for part in self.parts if part.name == "experts"]
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and any(part.holds(name) for part in parts):
                layer, _, own = name.rpartition(".")
                shape = own.partition("_of_")[2].partition("_")[0]
                groups.setdefault((f"{layer}/{shape}", 0), []).append(parameter.grad)
        return list(groups.values())

    # Expectation maximisation (Jordan and Jacobs 1994)

    @torch.no_grad()
    def em_step(self, x: Tensor, y: Tensor) -> float:
        """One step of EM on all examples; the mean log-likelihood before it, which never falls.

        For one layer of linear experts under linear gates or a tree of them. The M-step is
        least squares for Gaussian experts, and iteratively reweighted least squares else.
        """
        before = self.log_likelihood(x, y).mean()
        self.maximise(x, y, self.posterior(x, y))
        return float(before)

    @torch.no_grad()
    def maximise(
        self, x: Tensor, y: Tensor, posterior: Tensor, rounds: int = 3
    ) -> None:
        """The M-step: fit experts to y and gates to the posterior [B, E].

        rounds: of reweighted least squares; one is enough for Gaussian experts.
        """
        layer = _linear_layer(self)
        rows = x.to(layer.down.dtype)
        weight, bias = _joined(layer, "down")

        def targets(outputs: Tensor) -> Tensor:
            return self.log_density(outputs, y)

        for _ in range(rounds):
            weight = _newton(weight, _with_one(rows, bias), targets, posterior)
        _put(layer, "down", weight)
        self._fit_gates(layer, rows, posterior, rounds)

    def _fit_gates(
        self, layer: Any, rows: Tensor, posterior: Tensor, rounds: int
    ) -> None:
        """Each node's gate by the share of its branches in the posterior [B, E] of its leaves."""
        names, level = (["router"], 0) if hasattr(layer, "router") else ([], 1)
        while hasattr(layer, f"router_{level}"):
            names.append(f"router_{level}")
            level += 1
        parents = 1
        for name in names:
            weight, bias = _joined(layer, name)
            branches = weight.shape[-2]
            weight = weight.view(parents, branches, -1)
            shares = posterior.view(len(posterior), parents, branches, -1).sum(-1)

            def soft(outputs: Tensor, shares: Tensor = shares) -> Tensor:
                return (shares * outputs.log_softmax(-1)).sum(-1)

            every = torch.ones_like(shares[..., 0])
            for _ in range(rounds):
                weight = _newton(weight, _with_one(rows, bias), soft, every)
            _put(layer, name, weight)
            parents *= branches


def _gates(output: Any) -> tuple[Tensor, ...]:
    """Gates [B, E] of an Output, where experts are apart."""
    return (output.gates,) if hasattr(output, "gates") else ()


def _linear_layer(model: MixtureModel) -> Any:
    """The one layer of a model that EM can fit."""
    layers: Any = getattr(model, "layers", [])
    layer = layers[0]
    known = {"down", "down_bias", "router", "router_bias"}
    names = {name for name, _ in layer.named_parameters()}
    deep = hasattr(layer, "router") and hasattr(layer, "router_1")
    tree = {n for n in names if n.startswith("router_")}
    apart = len(layers) == 1 and type(model).log_density is not MixtureModel.log_density
    if not apart or deep or not names <= known | tree:
        raise TypeError(
            "EM fits one layer of linear experts with linear gates, and no head"
        )
    return layer


def _joined(layer: Any, name: str) -> tuple[Tensor, bool]:
    """A parameter [..., n, d], its bias, if it has one, as one more column: [..., n, d + 1]."""
    weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias", None)
    weight = weight.detach().double()
    if bias is None:
        return weight, False
    return torch.cat([weight, bias.detach().double().unsqueeze(-1)], -1), True


def _put(layer: Any, name: str, joined: Tensor) -> None:
    """Write what `_joined` gives back to a layer's parameters."""
    weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias", None)
    columns = weight.shape[-1]
    weight.copy_(joined[..., :columns].reshape(weight.shape))
    if bias is not None:
        bias.copy_(joined[..., columns].reshape(bias.shape))


def _with_one(rows: Tensor, bias: bool) -> Tensor:
    """rows [B, d] in double precision, with a column of ones where there is a bias."""
    rows = rows.double()
    return torch.cat([rows, torch.ones_like(rows[:, :1])], -1) if bias else rows


def _newton(
    weight: Tensor, rows: Tensor, value: Callable[[Tensor], Tensor], share: Tensor
) -> Tensor:
    """One step of Newton's method for each of E linear maps [E, n, d], never downhill.

    value: [B, E] of their outputs [B, E, n]; share [B, E] weighs it. Exact where the value
    is quadratic, else the step is halved until it helps, or not made.
    """

    def worth(maps: Tensor) -> Tensor:
        return (share * value(torch.einsum("bd,end->ben", rows, maps))).sum(0)

    slope, curve = _derivatives(value, torch.einsum("bd,end->ben", rows, weight))
    shape = weight.shape
    gradient = torch.einsum("be,ben,bd->end", share.double(), slope, rows).flatten(1)
    hessian = torch.einsum("be,benm,bd,bc->endmc", share.double(), -curve, rows, rows)
    hessian = hessian.reshape(shape[0], gradient.shape[1], gradient.shape[1])
    inverse = torch.linalg.pinv(hessian, hermitian=True)
    step = (inverse @ gradient.unsqueeze(-1)).view(shape)
    old, size = worth(weight), torch.ones(shape[0], 1, 1, dtype=weight.dtype)
    for _ in range(20):
        better = worth(weight + size * step) >= old
        if bool(better.all()):
            break
        size = torch.where(better.view(-1, 1, 1), size, size / 2)
    better = worth(weight + size * step) >= old
    return torch.where(better.view(-1, 1, 1), weight + size * step, weight)


def _derivatives(
    value: Callable[[Tensor], Tensor], outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """First [B, E, n] and second [B, E, n, n] derivatives of a value [B, E] by outputs."""
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(at).sum(), at, create_graph=True)
        columns = [
            torch.autograd.grad(slope[..., n].sum(), at, retain_graph=True)[0]
            for n in range(outputs.shape[-1])
        ]
    return slope.detach(), torch.stack(columns, -1)
