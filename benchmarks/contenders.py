"""The contenders that use torch, each as its users would write it."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from benchmarks import plan
from benchmarks.network import network
from benchmarks.workloads import Array, Workload

#: From x1 and x2 to the kernel.
Kernel = Callable[[Tensor, Tensor], Tensor]

#: The environment variable that says where this library lies as it was at another commit.
BEFORE_FOLDER = "GGN_NTK_BEFORE"

_PAIRS = 100  # samples whose Jacobians are held at once, of kernels of pairs

#: Rows and columns of the matrices whose product measures the rate of arithmetic.
MATRIX_SIZE = 4096


def prepare(contender: str, workload: Workload, device: str) -> tuple[Callable[[Array], Tensor], Kernel]:
    """Build a contender's network and its kernel function.

    Args:
        contender: Its name.
        workload: The workload.
        device: Where to compute.

    Returns:
        A function that loads samples, and one that computes the kernel from them.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # torch.func does not go through it
    # torch's default rounds the inputs of convolutions on GPUs, which is another problem than the others solve
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    kernel = _CONTENDERS[contender](network(workload, device), workload)
    return lambda x: torch.from_numpy(x).to(device), kernel


def _ggn_ntk(model: nn.Module, workload: Workload, clone: bool = False, **chosen: str) -> Kernel:
    """Use this library.

    Args:
        model: The network.
        workload: The workload.
        clone: Hide from it that x2 is x1.
        **chosen: Keywords of ``empirical_ntk``.

    Returns:
        The kernel function.
    """
    from ggn_ntk import empirical_ntk

    keywords = _keywords(workload) | chosen

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        second = x1.clone() if clone else None if workload.symmetric else x2
        return empirical_ntk(model, x1, second, **keywords)

    return kernel


def _prepared(model: nn.Module, workload: Workload) -> Kernel:
    """Use this library for a kernel that is computed again and again, and is verified in the first call.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    from ggn_ntk import empirical_ntk_fn

    kernel_fn = empirical_ntk_fn(model, **_keywords(workload))

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        return kernel_fn(x1, None if workload.symmetric else x2)

    return kernel


def _keywords(workload: Workload) -> dict[str, Any]:
    """Say what this library is asked for.

    Args:
        workload: The workload.

    Returns:
        Keywords of ``empirical_ntk``.
    """
    keywords: dict[str, Any] = {"compute": workload.compute, "method": "structured", "paired": workload.paired}
    return keywords | {"trace_axes": workload.trace_axes or None}


def _before(kind: Callable[[nn.Module, Workload], Kernel], model: nn.Module, workload: Workload) -> Kernel:
    """Use this library as it was at another commit.

    Args:
        kind: How it is used.
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    sys.path.insert(0, os.environ[BEFORE_FOLDER])
    return kind(model, workload)


def _by_hand(model: nn.Module, workload: Workload) -> Kernel:
    """Write down the kernel of a network of fully-connected layers and ReLUs, without any checks.

    Args:
        model: The network.
        workload: The workload, of a full kernel.

    Returns:
        The kernel function.
    """
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]

    def gram(x: Tensor, n1: int) -> Tensor:
        return (x[:n1] @ x[n1:].T + 1)[:, :, None, None]  # the 1 is the bias

    @torch.no_grad()
    def kernel(x1: Tensor, x2: Tensor) -> Tensor:
        n1, x, inputs = len(x1), torch.cat([x1, x2]), []
        for layer in layers:
            inputs.append(x)
            x = layer(x).relu()
        s = torch.eye(len(layers[-1].weight), device=x.device)
        total = gram(inputs[-1], n1) * s
        for number in reversed(range(len(layers) - 1)):
            s = (s @ layers[number + 1].weight) * (inputs[number + 1] > 0)[:, None]  # [N1 + N2, C, O]
            products = s[:n1].flatten(0, 1) @ s[n1:].flatten(0, 1).T  # [N1 C, N2 D]
            total = total + gram(inputs[number], n1) * products.view(n1, s.shape[1], -1, s.shape[1]).transpose(1, 2)
        return total

    return kernel


def _reduced(model: nn.Module, workload: Workload) -> Kernel:
    """Use this library for the full kernel, and sum over positions afterwards.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    full = _ggn_ntk(model, replace(workload, trace_axes=()))
    outputs = (workload.outputs, prod(workload.shapes()[-1][1:]))

    def kernel(x1: Tensor, x2: Tensor) -> Tensor:
        return torch.einsum("nmcpdp->nmcd", full(x1, x2).reshape(len(x1), len(x2), *outputs, *outputs))

    return kernel


def _functional(model: nn.Module) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """Turn a network into a function of its parameters and one sample.

    Args:
        model: The network.

    Returns:
        The parameters, and the function.
    """

    def evaluate(params: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(model, params, (x[None],))[0]

    return {name: p.detach() for name, p in model.named_parameters()}, evaluate


def _jacobian_contraction(model: nn.Module, workload: Workload) -> Kernel:
    """Hold both Jacobians and contract them, parameter by parameter, as in the PyTorch tutorial.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    params, evaluate = _functional(model)
    jacobian = vmap(jacrev(evaluate), (None, 0))
    equation = (
        "ncp,ndp->ncd" if workload.paired else {"full": "ncp,mdp->nmcd", "trace": "ncp,mcp->nm"}[workload.compute]
    )

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        first, second = jacobian(params, x1), jacobian(params, x2)
        # of outputs with several axes, positions are summed with the entries of parameters
        return sum(torch.einsum(equation, first[name].flatten(2), second[name].flatten(2)) for name in params)

    def of_pairs(x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([kernel(*some) for some in zip(x1.split(_PAIRS), x2.split(_PAIRS), strict=True)])

    return of_pairs if workload.paired else kernel


def _gradients(model: nn.Module, workload: Workload) -> Kernel:
    """Sum the kernels of one output after the other, each from the gradients of all samples.

    Args:
        model: The network.
        workload: The workload, of a trace.

    Returns:
        The kernel function.
    """
    params, evaluate = _functional(model)

    def of_output(x1: Tensor, x2: Tensor, output: int) -> Any:
        gradients = vmap(grad(lambda params, x: evaluate(params, x)[output]), (None, 0))
        first = gradients(params, x1)
        second = first if workload.symmetric else gradients(params, x2)
        return sum(first[name].flatten(1) @ second[name].flatten(1).T for name in params)

    return lambda x1, x2: sum(of_output(x1, x2, output) for output in range(workload.outputs))


def _ntk_vector_products(model: nn.Module, workload: Workload) -> Kernel:
    """Multiply the kernel with each unit vector, for all pairs and outputs at once, as in the PyTorch tutorial.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    params, evaluate = _functional(model)

    def of_pair(x: Tensor, y: Tensor) -> Tensor:
        output, pull_back = vjp(lambda params: evaluate(params, y), params)[:2]

        def product(vector: Tensor) -> Tensor:
            pushed: Tensor = jvp(lambda params: evaluate(params, x), (params,), pull_back(vector))[1]
            return pushed

        return vmap(product, out_dims=1)(torch.eye(len(output), dtype=output.dtype, device=output.device))

    return vmap(vmap(of_pair, (None, 0)), (0, None))


def _vivit(model: nn.Module, workload: Workload) -> Kernel:
    """Read the kernel off ViViT's Gram matrices of the stacked samples.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    from backpack import backpack, extend
    from vivit.extensions.secondorder.vivit import ViViTGGNExact

    from ggn_ntk import AccumulateGramHook

    model, loss_func = extend(model), extend(nn.MSELoss(reduction="sum"))

    def kernel(x1: Tensor, x2: Tensor) -> Tensor:
        model.zero_grad()
        hook = AccumulateGramHook()
        with backpack(ViViTGGNExact(), extension_hook=hook):
            output = model(torch.cat([x1, x2]))
            loss_func(output, torch.zeros_like(output)).backward()
        return hook.ntk(len(x1), loss=loss_func)

    return kernel


def _nngeometry(model: nn.Module, workload: Workload) -> Kernel:
    """Take the block of x1 and x2 of the Gram matrix of all samples.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    from nngeometry import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        x = torch.cat([x1, x2])
        gram = GramMatrix(model, DataLoader(TensorDataset(x), batch_size=len(x))).to_torch()  # [C, N, C, N]
        return gram.permute(1, 3, 0, 2)[: len(x1), len(x1) :]

    return kernel


def _asdfghjkl(model: nn.Module, workload: Workload) -> Kernel:
    """Let asdfghjkl differentiate twice.

    Its ``empirical_direct_ntk``, which forms the Jacobians, fails for every model in 0.1a5: it looks for an attribute
    of modules that nothing sets.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    from asdl import empirical_implicit_ntk

    return partial(empirical_implicit_ntk, model)


def _matrix_product(model: nn.Module, workload: Workload) -> Kernel:
    """Multiply two matrices, whatever the samples.

    Args:
        model: The network, for its device.
        workload: The workload.

    Returns:
        A function that returns their product.
    """
    device = next(model.parameters()).device
    first, second = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device) for _ in range(2))
    return lambda x1, x2: first @ second


_CONTENDERS: dict[str, Callable[[nn.Module, Workload], Kernel]] = {
    plan.GGN_NTK: _ggn_ntk,
    plan.PREPARED: _prepared,
    plan.BEFORE: partial(_before, _ggn_ntk),
    plan.PREPARED_BEFORE: partial(_before, _prepared),
    plan.BY_HAND: _by_hand,
    plan.CLONE: partial(_ggn_ntk, clone=True),
    plan.REDUCED: _reduced,
    plan.AUTOGRAD: partial(_ggn_ntk, capture="autograd"),
    plan.BOUNDED: partial(_ggn_ntk, memory="2GB"),
    plan.JACOBIANS: _jacobian_contraction,
    plan.GRADIENTS: _gradients,
    plan.PRODUCTS: _ntk_vector_products,
    plan.VIVIT: _vivit,
    plan.NNGEOMETRY: _nngeometry,
    plan.ASDFGHJKL: _asdfghjkl,
    plan.MATRIX_PRODUCT: _matrix_product,
}
