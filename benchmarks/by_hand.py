"""Any modules, beside loops by hand.

Recurrent layers, weights that are computed or used again, and derivatives as outputs: the symmetric kernel by
``empirical_ntk``; by ``empirical_ntk_fn``, which has verified it before; by ``vmap(jacrev)`` and by a loop over samples
and outputs as one would write them for a model, without any checks; and by this library's Jacobian contraction. They
take turns; times are medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import prune

from ggn_ntk import empirical_ntk, empirical_ntk_fn, explain
from ggn_ntk.reference import relative_error

# Contenders that take longer in a call are not timed again.
_PATIENCE = 20.0

_OURS, _PREPARED, _MAPPED, _LOOP = "empirical_ntk", "empirical_ntk_fn", "vmap(jacrev)", "loop"
_CONTRACTION = "Jacobian contraction"
_COLUMNS = [_OURS, _PREPARED, _MAPPED, _LOOP, _CONTRACTION]


class _Scaled(nn.Linear):
    """A linear layer in NTK parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias * 0.1)


class _Last(nn.Module):
    """A linear layer on the last state of a recurrent one."""

    def __init__(self, recurrent: Any, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(recurrent.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return states


class _Unrolled(nn.Module):
    """A recurrent network, written as a loop over time."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.state, self.entry, self.head = nn.Linear(width, width), nn.Linear(8, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.state.out_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.state(h) + self.entry(x[:, t]))
        outputs: Tensor = self.head(h)
        return outputs


class _Residual(nn.Module):
    """The residual of Burgers' equation, ``u_t + u u_x - u_xx / 10``, by backward passes inside of the forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.u = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            u = self.u(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (dux,) = torch.autograd.grad(du[:, 1].sum(), x, create_graph=True)
        residual: Tensor = du[:, 0] + u[:, 0] * du[:, 1] - 0.1 * dux[:, 1]
        return residual


class _MappedResidual(_Residual):
    """The same, by ``vmap`` over samples."""

    def forward(self, x: Tensor) -> Tensor:
        params = dict(self.u.named_parameters())
        residual: Tensor = vmap(lambda z: _residual(self.u, params, z))(x)
        return residual


def _residual(net: nn.Module, params: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Compute the residual at one point, as ``torch.func`` has it."""

    def u(z: Tensor) -> Tensor:
        value: Tensor = functional_call(net, dict(params), (z[None],))[0, 0]
        return value

    du = grad(u)(z)
    residual: Tensor = du[0] + u(z) * du[1] - 0.1 * grad(lambda z: grad(u)(z)[1])(z)[1]
    return residual


def _mlp(layer: Callable[[int, int], nn.Module], *sizes: int) -> nn.Sequential:
    """Build a fully-connected network."""
    layers = [m for pair in pairwise(sizes) for m in (layer(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _pruned(inputs: int, outputs: int) -> nn.Module:
    """Build a linear layer, half of whose weights are pruned at random."""
    layer: nn.Module = prune.random_unstructured(nn.Linear(inputs, outputs), "weight", 0.5)
    return layer


def _albert() -> nn.Module:
    """Build an ALBERT of twelve layers that are the same."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes: dict[str, Any] = {
        "num_labels": 3,
        "attn_implementation": "eager",
        "embedding_size": 32,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    }
    config = AlbertConfig(vocab_size=200, num_hidden_layers=12, **sizes)
    return _Logits(AlbertForSequenceClassification(config))


class _Logits(nn.Module):
    """The logits of what a language model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def _nf_resnet() -> nn.Module:
    """Build a network without normalisation, whose weights are standardised."""
    import timm

    model: nn.Module = timm.create_model("nf_resnet26", num_classes=10)
    return model


class Case(NamedTuple):
    """A model and its samples."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    plain: str = ""  # the case it is compared with, where that is not a loop by hand


_SIZES, _WIDE = (784, 512, 512, 10), (3072, 1024, 1024, 10)
CASES = {
    "mlp": Case(lambda: _mlp(nn.Linear, *_SIZES), lambda: torch.randn(32, 784)),
    "mlp, NTK parametrization": Case(lambda: _mlp(_Scaled, *_SIZES), lambda: torch.randn(32, 784), "mlp"),
    "mlp, pruned": Case(lambda: _mlp(_pruned, *_SIZES), lambda: torch.randn(32, 784), "mlp"),
    "wide mlp": Case(lambda: _mlp(nn.Linear, *_WIDE), lambda: torch.randn(64, 3072)),
    "wide mlp, NTK parametrization": Case(lambda: _mlp(_Scaled, *_WIDE), lambda: torch.randn(64, 3072), "wide mlp"),
    "wide mlp, pruned": Case(lambda: _mlp(_pruned, *_WIDE), lambda: torch.randn(64, 3072), "wide mlp"),
    "GRU": Case(lambda: _Last(nn.GRU(32, 128, batch_first=True), 10), lambda: torch.randn(32, 40, 32)),
    "LSTM": Case(lambda: _Last(nn.LSTM(32, 128, batch_first=True), 10), lambda: torch.randn(32, 40, 32)),
    "unrolled RNN, T = 80, 2 outputs": Case(lambda: _Unrolled(128, 2), lambda: torch.randn(32, 80, 8)),
    "unrolled RNN, T = 80, 10 outputs": Case(lambda: _Unrolled(256, 10), lambda: torch.randn(32, 80, 8)),
    "ALBERT": Case(_albert, lambda: torch.randint(200, (32, 24))),
    "nf_resnet26": Case(_nf_resnet, lambda: torch.randn(8, 3, 64, 64)),
    "PDE residual, autograd": Case(lambda: _Residual(64), lambda: torch.randn(300, 2)),
    "PDE residual, torch.func": Case(lambda: _MappedResidual(64), lambda: torch.randn(300, 2)),
}


def _mapped(model: nn.Module, x: Tensor) -> Tensor:
    """Compute a kernel from the Jacobians that ``vmap(jacrev)`` computes."""
    # x [N, ...] -> [N, N, C, C]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def output(params: dict[str, Tensor], z: Tensor) -> Tensor:
        if isinstance(model, _Residual):
            return _residual(model.u, {name.removeprefix("u."): p for name, p in params.items()}, z)[None]
        value: Tensor = functional_call(model, params, (z[None],))[0]
        return value

    jacobians = vmap(jacrev(output), (None, 0))(params, x)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
    return torch.einsum("ncp,mdp->nmcd", jacobian, jacobian)


def _looped(model: nn.Module, x: Tensor) -> Tensor:
    """Compute a kernel from the gradient of each output of each sample."""
    # x [N, ...] -> [N, N, C, C]
    outputs, params = model(x).flatten(1) if model(x).ndim > 1 else model(x).unsqueeze(1), list(model.parameters())
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for sample in outputs for entry in sample]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).unflatten(0, outputs.shape)
    return torch.einsum("ncp,mdp->nmcd", jacobian, jacobian)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time the contenders of a case.

    Args:
        name: The case.
        rounds: How often each is timed, after one round to warm up.

    Returns:
        Seconds by contender, errors against a loop or ``vmap(jacrev)``, and the share of entries that rules cover.
    """
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.build().eval(), case.inputs()
    explained = explain(model, x)
    prepared = empirical_ntk_fn(model)
    ours = partial(empirical_ntk, model, x)
    contenders: dict[str, Callable[[], Any]] = {_OURS: ours, _PREPARED: lambda: prepared(x)}
    for _ in range(3):  # the first verifies; for small networks the third writes down what is done
        prepared(x)
    if not case.plain and name not in ("mlp", "wide mlp"):
        copy = deepcopy(model)  # torch.func may leave weights of recurrent layers replaced where it fails
        contenders |= {_MAPPED: lambda: _mapped(copy, x), _LOOP: lambda: _looped(model, x)}
        contenders |= {_CONTRACTION: partial(ours, method="jacobian_contraction")}
    seconds: dict[str, list[float]] = {}
    kernels: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for contender in list(contenders)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            try:
                kernels[contender] = contenders[contender]()
            except RuntimeError as error:
                print(f"{name}: {contender} fails ({str(error).splitlines()[0]})")
                del contenders[contender]
                continue
            taken = time.perf_counter() - start
            if number:
                seconds.setdefault(contender, []).append(taken)
            elif taken > _PATIENCE:
                seconds[contender] = [taken]
                del contenders[contender]
    reference = kernels.get(_MAPPED, kernels.get(_LOOP))
    off = None if reference is None else relative_error(kernels[_OURS].reshape(reference.shape), reference)
    return {"seconds": seconds, "error": off, "covered": explained.covered / explained.entries}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write results as a table.

    Args:
        results: What :func:`measure` returns, by case.

    Returns:
        The table, in Markdown.
    """
    lines = ["| model | covered | " + " | ".join(_COLUMNS) + " | beside the plain one |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    medians = {name: {c: statistics.median(s) for c, s in r["seconds"].items()} for name, r in results.items()}
    for name, result in results.items():
        times = [f"{1e3 * medians[name][c]:.3g} ms" if c in medians[name] else "" for c in _COLUMNS]
        plain = CASES[name].plain
        ratios = [f"{medians[name][c] / medians[plain][c]:.2f}" for c in (_OURS, _PREPARED) if plain in medians]
        lines.append(f"| {name} | {result['covered']:.1%} | {' | '.join(times)} | {', '.join(ratios)} |")
    return "\n".join(lines)
