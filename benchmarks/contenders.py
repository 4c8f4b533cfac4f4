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
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from benchmarks import plan
from benchmarks.network import network
from benchmarks.workloads import Array, Workload

#: From x1 and x2 to the kernel.
Kernel = Callable[[Tensor, Tensor], Tensor]

#: The environment variable that says where this library lies as it was at another commit.
BEFORE_FOLDER = "GGN_NTK_BEFORE"

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


def _ggn_ntk(model: nn.Module, workload: Workload, clone: bool = False, capture: str = "auto") -> Kernel:
    """Use this library.

    Args:
        model: The network.
        workload: The workload.
        clone: Hide from it that x2 is x1.
        capture: How it finds the layers' inputs and Jacobians.

    Returns:
        The kernel function.
    """
    from ggn_ntk import empirical_ntk

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        second = x1.clone() if clone else None if workload.symmetric else x2
        traced = workload.trace_axes or None
        return empirical_ntk(
            model, x1, second, compute=workload.compute, method="structured", capture=capture, trace_axes=traced
        )

    return kernel


def _before(model: nn.Module, workload: Workload) -> Kernel:
    """Use this library as it was at another commit.

    Args:
        model: The network.
        workload: The workload.

    Returns:
        The kernel function.
    """
    sys.path.insert(0, os.environ[BEFORE_FOLDER])
    return _ggn_ntk(model, workload)


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
    equation = {"full": "ncp,mdp->nmcd", "trace": "ncp,mcp->nm"}[workload.compute]

    def kernel(x1: Tensor, x2: Tensor) -> Any:
        first, second = jacobian(params, x1), jacobian(params, x2)
        # of outputs with several axes, positions are summed with the entries of parameters
        return sum(torch.einsum(equation, first[name].flatten(2), second[name].flatten(2)) for name in params)

    return kernel


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
    plan.BEFORE: _before,
    plan.CLONE: partial(_ggn_ntk, clone=True),
    plan.REDUCED: _reduced,
    plan.AUTOGRAD: partial(_ggn_ntk, capture="autograd"),
    plan.JACOBIANS: _jacobian_contraction,
    plan.PRODUCTS: _ntk_vector_products,
    plan.VIVIT: _vivit,
    plan.NNGEOMETRY: _nngeometry,
    plan.ASDFGHJKL: _asdfghjkl,
    plan.MATRIX_PRODUCT: _matrix_product,
}
