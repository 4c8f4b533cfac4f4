"""The ViViT route: the NTK as a block of the GGN's Gram matrix.

Stack x1 and x2 to N = N1 + N2 samples. For the loss l(f) = |f - y|^2 (``MSELoss(reduction="sum")``), the
loss Hessian is H = 2 I. The generalized Gauss-Newton is G = V V^T with V = J^T sqrt(H) = sqrt(2) J^T, and its
Gram matrix V^T V = 2 J J^T holds twice the NTK of all pairs. ViViT (Dangel, Tatzel, Hennig: "ViViT: Curvature
access through the generalized Gauss-Newton's low-rank structure", TMLR 2022, section 3) computes this matrix
layer by layer in one backward pass, as ``[C, N, C, N]``. The NTK of x1 and x2 is half its off-diagonal block.

Letters: ``n``, ``m`` samples; ``c``, ``d`` outputs.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from backpack import backpack, disable, extend, memory_cleanup
from backpack.custom_module.slicing import Slicing
from torch import Size, Tensor
from torch.nn import Flatten, Module, MSELoss, Parameter
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.extensions.backpack_internals import EXTENDED, hook_handles
from ggn_ntk.extensions.gram_hook import GramSum, kernel_block
from ggn_ntk.extensions.limits import AVG_POOLS, check_vivit
from ggn_ntk.memory.budget import resolve_axes
from ggn_ntk.methods.computation import compute as _compute
from ggn_ntk.models.comparison import GRADIENT_TOLERANCES, check_finite, cotangent, differing
from ggn_ntk.models.gradients import gradients
from ggn_ntk.models.inspection import OwnGenerator
from ggn_ntk.problem.errors import OTHER_METHOD, Problem, UnsupportedRouteError, is_out_of_memory
from ggn_ntk.problem.output_axes import AxesRequest, KernelAxes
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.result import Computed
from ggn_ntk.process.progress import Wanted, counting, showing
from ggn_ntk.process.torch_internals import COMPILED_CALL, buffers_of, children_of, parameters_of, uncompiled

_ROUTE = "empirical NTK through ViViT"
_ONE_AT_A_TIME = threading.RLock()


def empirical_ntk_vivit(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: str | Iterable[str] | None = None,
    per_parameter: bool | str = False,
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    memory: int | str | None = None,
    progress: Wanted = None,
) -> Tensor | dict[Any, Any]:
    """Compute the empirical NTK of a Sequential model from ViViT's GGN Gram matrices.

    One backward pass yields the Gram matrix of all (N1 + N2)^2 pairs, of which the N1 N2 wanted ones are kept:
    ViViT has no way to leave out the others. With ``x2=None``, x1 is not stacked on itself. For ``"diagonal"``
    and ``"trace"``, one backward pass for each output yields a Gram matrix ``[1, N, 1, N]``, so pairs of
    different outputs are never formed; with axes, one backward pass for each group of outputs that meet.

    Args:
        model: Built from ``nn.Sequential`` and the layers of ``ViViTGGNExact``.
        x1: N1 samples, a tensor ``[N1, ...]`` of the model's dtype (float32 or float64) on its device.
        x2: N2 samples, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: The parameters to sum over, as for :func:`ggn_ntk.empirical_ntk`.
        per_parameter: Return one kernel for each parameter, or each ``"module"``, by name.
        output: As for :func:`ggn_ntk.empirical_ntk`. ViViT takes the last layer's output alone, so that anything but
            ``None`` is refused, by an error that lists it among the problems of the model.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        memory: Bytes that the call may take, or text such as ``"8GiB"``; ``None`` for what the device has free. A
            kernel that cannot fit is refused at once. What ViViT holds besides cannot be divided: it takes all samples
            at once.
        progress: A bar, for ``None`` on a terminal where it is expected to take over ten seconds; ``True``, ``False``,
            or a callable that is called with the numbers of backward passes that are done and of all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``; with axes, ``[N1, N2, *(x1's axes not traced),
        *(x2's axes neither traced nor diagonal)]``; or a dict of such kernels.

    Raises:
        UnsupportedModelError: If the model has no exact kernel, or ViViT does not get it right; lists every problem.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes)
    request = Request.parse(
        model,
        x1,
        x2,
        axes,
        params=params,
        per_parameter=per_parameter,
        output=output,
        memory=memory,
        progress=progress,
    )
    return _compute(request, vivit_kernels)


def vivit_kernels(request: Request) -> Computed:
    """Compute kernels, if ViViT gets them right for the model. Call it inside ``isolated(request.model)``."""
    refused = {
        "ViViT computes the Gram matrix of all pairs of samples, of which paired=True takes N": request.axes.paired,
        "ViViT takes each sample for an input, and interacting=True the whole batch": request.axes.interacting,
    }
    problems = [Problem("", what, OTHER_METHOD) for what, asked in refused.items() if asked]
    if problems:
        raise UnsupportedRouteError(problems, _ROUTE)
    axes = resolve_axes(request, [check_vivit(request)])
    problems = list(_compare_kernels(request, axes.first.out_shape))
    if problems:
        raise UnsupportedRouteError(problems, _ROUTE)
    return _gram_kernels(request, axes)


def _compare_kernels(request: Request, out_shape: Size) -> Iterator[Problem]:
    """Compare the kernel of one random sample with autograd, since not every option can be read off a layer."""
    # For a sample x and a vector v, each parameter's kernel must satisfy v^T Theta(x, x) v = |J(x)^T v|^2. Both are
    # drawn at random, so that nothing special about the user's samples hides a difference.
    # out_shape [*out]
    sample = request.x1[:1].map(lambda x: cotangent(x, seed=0))
    v = cotangent(next(iter(sample.tensors.values())), 1, Size([1, *out_shape]))
    expected = {name: gradient.square().sum() for name, gradient in gradients(request, sample, v)[1].items()}
    check_finite(expected.values())
    flat, of_sample = v.flatten(), replace(request, x1=sample, x2=None, per_parameter=True)
    with showing(False):
        kernels = _gram_kernels(of_sample, AxesRequest.parse("full").resolve(out_shape)).kernels  # [1, 1, 1, C, C]
    actual = {name: flat @ kernel[0, 0, 0] @ flat for name, kernel in kernels}
    for name, error in differing(actual, expected, GRADIENT_TOLERANCES[v.dtype]).items():
        what = f"its kernel by ViViT differs from autograd's (relative error {error:.1e} on a random sample)"
        yield Problem(name, what, OTHER_METHOD)


def _gram_kernels(request: Request, axes: KernelAxes) -> Computed:
    """Compute kernels from Gram matrices, on a twin of the model."""
    (samples,) = request.inputs.tensors.values()
    params: dict[str, Parameter] = {}
    twin = _twin(uncompiled(request.model), {id(p): name for name, p in request.params.items()}, params)
    kernels: dict[str, Tensor] = {}
    # One backward pass for each group of outputs that meet in the kernel: a single one for the full kernel.
    groups = axes.first.numbers.movedim(2, 1).flatten(0, 1)  # [E T, F]
    several = len(groups) > 1
    pools = any(isinstance(module, AVG_POOLS) for module in twin.modules())
    with _backpack_session(samples.dtype if pools else None) as extended, counting(len(groups)) as progress:
        output = extended(twin)(samples)
        flat = extended(Flatten())(output) if output.ndim > 2 else output
        extension = _NamingViViT(twin)
        for number, group in enumerate(groups):
            chosen = extended(Slicing((slice(None), group)))(flat) if several else flat
            for name, gram in _backward(extended, params, extension, request.groups, chosen, several):
                block = kernel_block(gram, request.n1, 2)  # [N1, N2, 1, F, F]
                if name not in kernels:
                    kernels[name] = block.new_zeros(*block.shape[:2], *axes.shape)
                kernels[name][:, :, number // axes.first.roles.traced] += block[:, :, 0]
            progress.add()
    return Computed(axes, kernels.items(), [output.detach()])


def _backward(
    extended: Callable[[Module], Module],
    params: dict[str, Parameter],
    extension: ViViTGGNExact,
    groups: dict[str, str],
    output: Tensor,
    retain_graph: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Run one backward pass with ViViT, for Gram matrices by the name of the kernel."""
    # output [N, C] -> [C, N, C, N]
    hook = _GramsByParameter() if any(groups.values()) else GramSum()
    loss_func = extended(MSELoss(reduction="sum"))
    with backpack(extension, extension_hook=hook, retain_graph=retain_graph):
        loss = loss_func(output, torch.zeros_like(output))  # the target plays no part in the Hessian
        torch.autograd.grad(loss, list(params.values()), retain_graph=retain_graph)
    if isinstance(hook, _GramsByParameter):
        yield from ((groups[name], hook.grams[id(p)]) for name, p in params.items())
    else:
        assert hook.gram is not None
        yield "", hook.gram


class _NamingViViT(ViViTGGNExact):
    """ViViT's extension, with errors that name the module they come from."""

    def __init__(self, model: Module) -> None:
        """Take the model whose modules it names."""
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}

    def __call__(self, module: Module, g_inp: tuple[Tensor, ...], g_out: tuple[Tensor, ...]) -> None:
        """Backpropagate through a module."""
        try:
            super().__call__(module, g_inp, g_out)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"BackPACK raised {type(error).__name__}: {error}".rstrip(".")
            raise UnsupportedRouteError([Problem(self._names.get(module, ""), what, OTHER_METHOD)], _ROUTE) from error


class _GramsByParameter(GramSum):
    """Keeps the Gram matrices of parameters apart.

    Attributes:
        grams: The Gram matrices ``[C, N, C, N]`` by the parameter's id.
    """

    def __init__(self) -> None:
        """Begin without any."""
        super().__init__()
        self.grams: dict[int, Tensor] = {}

    def _accumulate(self, param: Tensor, gram: Tensor) -> None:
        """Keep one parameter's Gram matrix."""
        # gram [C, N, C, N]
        self.grams[id(param)] = gram


def _twin(module: Module, wanted: dict[int, str], params: dict[str, Parameter]) -> Module:
    """Build a twin of a module: the same layers on the same data, without its hooks; list its wanted parameters."""
    # BackPACK's hooks and flags, the inputs and outputs it stores, gradients and Gram matrices all land on the twin, so
    # the model itself is never touched.
    twin = type(module).__new__(type(module))
    Module.__init__(twin)
    own_state = {*vars(twin), EXTENDED, COMPILED_CALL}
    vars(twin).update((name, value) for name, value in vars(module).items() if name not in own_state)
    memory_cleanup(twin)
    twin.training = module.training
    buffers_of(twin).update(buffers_of(module))
    for key, param in parameters_of(module).items():
        name = wanted.get(id(param))
        parameters_of(twin)[key] = own = None if param is None else Parameter(param.detach(), name is not None)
        if name is not None and own is not None:
            params[name] = own
    for key, child in children_of(module).items():
        children_of(twin)[key] = None if child is None else _twin(child, wanted, params)
    return twin


@contextmanager
def _backpack_session(pooled: torch.dtype | None) -> Iterator[Callable[[Module], Module]]:
    """Let BackPACK extend modules and store their inputs and outputs; undo what that does to the process."""
    roots: list[Module] = []

    def extended(module: Module) -> Module:
        roots.append(module)
        extend(module)
        return module

    # BackPACK holds all of this for the process, so one thread at a time has a session.
    with _ONE_AT_A_TIME, ExitStack() as stack:
        store_io, default_dtype, handles = disable.store_io, torch.get_default_dtype(), len(hook_handles())
        disable.store_io = True
        if pooled is not None:
            # For average pooling BackPACK makes a convolution, whose weights it draws, in the default dtype.
            torch.set_default_dtype(pooled)
            stack.enter_context(OwnGenerator())
        try:
            yield extended
        finally:
            disable.store_io = store_io
            torch.set_default_dtype(default_dtype)
            del hook_handles()[handles:]
            for root in roots:
                for module in root.modules():
                    memory_cleanup(module)
