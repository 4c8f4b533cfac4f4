"""The ViViT route: the NTK as a block of the GGN's Gram matrix.

Stack x1 and x2 to N = N1 + N2 samples. For the loss l(f) = |f - y|^2 (``MSELoss(reduction="sum")``), the
loss Hessian is H = 2 I. The generalized Gauss-Newton is G = V V^T with V = J^T sqrt(H) = sqrt(2) J^T, and its
Gram matrix V^T V = 2 J J^T holds twice the NTK of all pairs. ViViT (Dangel, Tatzel, Hennig: "ViViT: Curvature
access through the generalized Gauss-Newton's low-rank structure", TMLR 2022, section 3) computes this matrix
layer by layer in one backward pass, as ``[C, N, C, N]``. The NTK of x1 and x2 is half its off-diagonal block.

Letters: ``n``, ``m`` samples; ``c``, ``d`` outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from backpack import backpack, disable, extend, memory_cleanup
from backpack.context import CTX
from backpack.custom_module.slicing import Slicing
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Size, Tensor
from torch.nn import Flatten, Module, MSELoss, Parameter
from torch.nn.modules.loss import _Loss
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.axes import AxesRequest, OutputAxes
from ggn_ntk.checks import (
    BATCH_STATISTICS,
    OTHER_METHOD,
    PROBE_TOLERANCES,
    VIVIT_CHECKS,
    Problem,
    UnsupportedModelError,
    check_model,
    cotangent,
    eager,
    find,
    gradient_error,
    gradients,
    is_out_of_memory,
)
from ggn_ntk.isolation import isolated
from ggn_ntk.layout import Computed, finish
from ggn_ntk.request import Request, check_split

_SAVEFIELD = "vivit_ggn_exact"
_ROUTE = "empirical NTK through ViViT"


class AccumulateGramHook:
    """BackPACK extension hook that sums ViViT's Gram matrices over parameters.

    It takes no part in the gradients and leaves other extensions' quantities alone, so the kernel can be
    read off a backward pass that is run anyway:

    >>> from backpack import backpack, extend
    >>> from backpack.extensions import BatchGrad
    >>> from torch import nn
    >>> from vivit.extensions.secondorder.vivit import ViViTGGNExact
    >>> model, loss_func = extend(nn.Linear(4, 2)), extend(nn.MSELoss())
    >>> hook = AccumulateGramHook()
    >>> with backpack(ViViTGGNExact(), BatchGrad(), extension_hook=hook):
    ...     loss_func(model(torch.randn(5, 4)), torch.zeros(5, 2)).backward()
    >>> hook.ntk(loss=loss_func).shape
    torch.Size([5, 5, 2, 2])

    Every backward pass starts afresh, at its loss. Frozen parameters are skipped. The kernel is that of the
    parameters and the network that took part in the pass: of extended modules only, and with active dropout of the
    network without what was dropped.

    Attributes:
        gram: The Gram matrix ``[C, N, C, N]``, summed over parameters; ``None`` until a backward pass has ended.
        delete_buffers: Whether ViViT's buffers are deleted from each parameter once its Gram matrix is added.
    """

    def __init__(self, delete_buffers: bool = True) -> None:
        """Set up the hook.

        Args:
            delete_buffers: Delete ViViT's buffers from each parameter as the backward pass moves on.
        """
        self.delete_buffers = delete_buffers
        self.gram: Tensor | None = None
        self._pass_id: int | None = None
        self._seen: set[int] = set()
        self._sum: Tensor | None = None
        self._loss: tuple[type[Module], str] | None = None
        self._loss_numel = 0

    def __call__(self, module: Module) -> None:
        """Add a module's Gram matrices. BackPACK calls this in the backward pass.

        Args:
            module: The module that BackPACK has just finished with.

        Raises:
            RuntimeError: If the backward pass has more than one extended loss (BackPACK adds up what they
                backpropagate), or a parameter has no Gram matrix.
            UnsupportedModelError: If samples interact in the module, it has options that BackPACK ignores, or
                a parameter is used a second time.
        """
        if isinstance(module, _Loss):
            self._start(module)
        else:
            self._add(module)

    def _start(self, loss: Any) -> None:
        """Begin a backward pass.

        Args:
            loss: The extended loss it begins at.

        Raises:
            RuntimeError: If it began before, at another loss, or ViViT is not active, or holds quantities of
                another pass.
        """
        self.gram = None
        pass_id = torch._C._current_graph_task_id()
        if pass_id == self._pass_id:
            raise RuntimeError(
                "More than one extended loss in a backward pass: BackPACK adds up what they backpropagate, so the "
                "Gram matrix is that of none of them. Extend one loss only, or run one backward pass for each."
            )
        extensions = [e for e in CTX.get_active_exts() if isinstance(e, ViViTGGNExact)]
        if not extensions:
            raise RuntimeError(
                "ViViT is not active. Activate it beside this hook: backpack(ViViTGGNExact(), extension_hook=hook)."
            )
        if any(len(extension.saved_quantities._saved_quantities) != 1 for extension in extensions):
            raise RuntimeError(
                "The ViViTGGNExact object holds quantities of another pass, which BackPACK would add to this one's. "
                "Create a new one for each pass."
            )
        self._sum, self._seen, self._pass_id = None, set(), pass_id
        self._loss, self._loss_numel = (type(loss), loss.reduction), loss.input0.numel()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(extensions))

    def _finish(self, extensions: list[ViViTGGNExact]) -> None:
        """Publish the sum at the end of a backward pass; one that fails half-way never gets here.

        Args:
            extensions: The active ViViT extensions. What BackPACK has saved for inputs that require a gradient
                is cleared, or the next pass with the same extension would add to it.
        """
        self.gram = self._sum
        for extension in extensions:
            extension.saved_quantities = SavedQuantities()

    def _add(self, module: Module) -> None:
        """Add the Gram matrices of a module's own parameters.

        Args:
            module: The module.

        Raises:
            RuntimeError: If a parameter has no Gram matrix.
            UnsupportedModelError: If the module's Gram matrix is not that of its Jacobian.
        """
        kind = type(module).__name__
        problems = list(find([BATCH_STATISTICS, *VIVIT_CHECKS], module, kind))
        params = {f"{kind}.{name}": p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        for name, param in params.items():
            if id(param) in self._seen:
                what = "it is used more than once, and ViViT drops the cross-terms"
                problems.append(Problem(name, what, "Use ggn_ntk.empirical_ntk"))
        if problems:
            raise UnsupportedModelError(problems, "NTK from this backward pass")
        for name, param in params.items():
            self._seen.add(id(param))
            self._accumulate(param, self._gram_of(param, name))

    def _gram_of(self, param: Tensor, name: str) -> Tensor:
        """Evaluate a parameter's Gram matrix, and free what ViViT stored for it.

        Args:
            param: The parameter.
            name: What to call it in a message.

        Returns:
            Its Gram matrix ``[C, N, C, N]``.

        Raises:
            RuntimeError: If ViViT has stored nothing for it.
        """
        if not hasattr(param, _SAVEFIELD):
            raise RuntimeError(
                f"ViViT has no Gram matrix for {name}. Register how to compute it with "
                "ViViTGGNExact.set_module_extension, or freeze the parameter."
            )
        gram: Tensor = getattr(param, _SAVEFIELD)["gram_mat"]().detach()
        if self.delete_buffers:
            delattr(param, _SAVEFIELD)
        return gram

    def _accumulate(self, param: Tensor, gram: Tensor) -> None:
        """Add one parameter's Gram matrix to the sum.

        Args:
            param: The parameter.
            gram: Its Gram matrix ``[C, N, C, N]``.
        """
        self._sum = gram if self._sum is None else self._sum.add_(gram)

    def ntk(self, n1: int | None = None, *, loss: Module) -> Tensor:
        """Turn the Gram matrix into the NTK.

        The Gram matrix of ``MSELoss`` is h J J^T with h = 2 for reduction ``"sum"``, and h = 2 / (N C) for
        ``"mean"`` (its Hessian h I, from differentiating the loss twice).

        Args:
            n1: How many leading samples of the batch are x1, the others x2. ``None``: all of them are both.
            loss: The loss of the backward pass.

        Returns:
            The NTK ``[N1, N2, C, C]``; for ``n1=None`` ``[N, N, C, C]``, exactly symmetric.

        Raises:
            RuntimeError: If there was no backward pass.
            TypeError: If ``n1`` is not an integer.
            ValueError: If ``loss`` is not the ``MSELoss`` of the backward pass with reduction ``"sum"`` or
                ``"mean"``, or ``n1`` is not between 1 and N - 1.
        """
        if self.gram is None or self._loss is None:
            raise RuntimeError(
                "No Gram matrix yet: run a backward pass through an extended model and loss inside "
                "`with backpack(ViViTGGNExact(), extension_hook=hook):` first."
            )
        if type(loss) is not MSELoss or loss.reduction not in ("sum", "mean"):
            raise ValueError(
                f"loss must be MSELoss with reduction 'sum' or 'mean', got {loss}: the Gram matrix of any other loss "
                "is weighted by the loss Hessian, and is not the NTK."
            )
        if self._loss != (type(loss), loss.reduction):
            kind, reduction = self._loss
            raise ValueError(
                f"loss must be that of the backward pass, {kind.__name__} with reduction {reduction!r}, got {loss}."
            )
        hessian = 2 if loss.reduction == "sum" else 2 / self._loss_numel
        num_outputs, n = self.gram.shape[:2]
        if n1 is not None:
            check_split(n1, n)
        return finish(_kernel_block(self.gram, n1, hessian), OutputAxes(Size([num_outputs])), symmetric=n1 is None)


def _kernel_block(gram: Tensor, n1: int | None, hessian: float) -> Tensor:
    """Reorder, slice and rescale a Gram matrix.

    Args:
        gram: ``[C, N, C, N]``.
        n1: How many samples are x1; ``None`` for all.
        hessian: The number h in the loss Hessian h I.

    Returns:
        ``[N1, N2, 1, C, C]``, or ``[N, N, 1, C, C]`` for ``n1=None``.
    """
    kernel = gram.permute(1, 3, 0, 2).unsqueeze(2)  # cndm -> nmecd
    return (kernel if n1 is None else kernel[:n1, n1:]) / hessian


def empirical_ntk_vivit(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Compute the empirical NTK of a Sequential model from ViViT's GGN Gram matrices.

    One backward pass yields the Gram matrix of all (N1 + N2)^2 pairs, of which the N1 N2 wanted ones are kept:
    ViViT has no way to leave out the others. With ``x2=None``, x1 is not stacked on itself. For ``"diagonal"``
    and ``"trace"``, one backward pass for each output yields a Gram matrix ``[1, N, 1, N]``, so pairs of
    different outputs are never formed.

    Args:
        model: Built from ``nn.Sequential`` and the layers of ``ViViTGGNExact``.
        x1: N1 samples, a tensor ``[N1, ...]`` of the model's dtype (float32 or float64) on its device.
        x2: N2 samples, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: Names of the parameters to sum over; ``None`` for all that require a gradient.
        per_parameter: Return one kernel for each parameter, by name.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``, or a dict of such kernels.

    Raises:
        UnsupportedModelError: If the model has no exact kernel, or ViViT does not get it right; lists every problem.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    request = Request.parse(model, x1, x2, AxesRequest.parse(compute), params=params, per_parameter=per_parameter)
    with isolated(model):
        computed = vivit_kernels(request)
        return request.assemble(computed.kernels, computed.axes)


def vivit_kernels(request: Request) -> Computed:
    """Compute kernels, if ViViT gets them right for the model. Call it inside ``isolated(request.model)``.

    Args:
        request: The request.

    Returns:
        The kernels, and the outputs of all samples.

    Raises:
        UnsupportedModelError: If it does not.
    """
    axes = request.axes.resolve(check_model(request, vivit=True))
    problems = list(_probe_kernels(request, axes.out_shape))
    if problems:
        raise UnsupportedModelError(problems, _ROUTE)
    return _gram_kernels(request, axes)


def _probe_kernels(request: Request, out_shape: Size) -> Iterator[Problem]:
    """Compare the kernel of one random sample with autograd, since not every option can be read off a layer.

    For a sample x and a vector v, each parameter's kernel must satisfy v^T Theta(x, x) v = |J(x)^T v|^2. Both
    are drawn at random, so that nothing special about the user's samples hides a difference.

    Args:
        request: The request.
        out_shape: The shape ``[*out]`` of one sample's output.

    Yields:
        A problem for each parameter whose kernel differs.
    """
    sample = request.x1[:1].map(lambda x: cotangent(x, seed=0))
    v = cotangent(sample.args[0].new_empty(1, *out_shape), seed=1)
    expected = {name: gradient.square().sum() for name, gradient in gradients(request, sample, v).items()}
    total, v = sum(e.item() for e in expected.values()), v.flatten()
    of_sample = replace(request, x1=sample, x2=None, per_parameter=True)
    for name, kernel in _gram_kernels(of_sample, OutputAxes(out_shape)).kernels:
        error = gradient_error(v @ kernel[0, 0, 0] @ v, expected[name], total)
        if not error <= PROBE_TOLERANCES[v.dtype]:
            what = f"its kernel by ViViT differs from autograd's (relative error {error:.1e} on a random sample)"
            yield Problem(name, what, OTHER_METHOD)


def _gram_kernels(request: Request, axes: OutputAxes) -> Computed:
    """Compute kernels from Gram matrices, on a twin of the model.

    One backward pass for each group of free outputs, those that have to meet: for the full kernel, of all outputs.

    Args:
        request: A request for a model that ViViT supports.
        axes: The role of each output axis.

    Returns:
        The kernels, and the outputs of all samples.
    """
    samples = request.x1.stack(request.x2).args[0]
    params: dict[str, Parameter] = {}
    twin = _twin(eager(request.model), {id(p): name for name, p in request.params.items()}, params)
    kernels: dict[str, Tensor] = {}
    groups = axes.numbers.movedim(2, 1).flatten(0, 1)  # [E T, F]
    several = len(groups) > 1
    with _backpack_session(samples.dtype) as extended:
        output = extended(twin)(samples)
        flat = extended(Flatten())(output) if output.ndim > 2 else output
        extension = _NamingViViT(twin)
        for number, group in enumerate(groups):
            chosen = extended(Slicing((slice(None), group)))(flat) if several else flat
            for name, gram in _backward(extended, params, extension, request.per_parameter, chosen, several):
                block = _kernel_block(gram, request.n1, 2)
                if name not in kernels:
                    kernels[name] = block.new_zeros(*block.shape[:2], *axes.roles.kernel)
                kernels[name][:, :, number // axes.roles.traced] += block[:, :, 0]
    return Computed(axes, kernels.items(), output.detach())


def _backward(
    extended: Callable[[Module], Module],
    params: dict[str, Parameter],
    extension: ViViTGGNExact,
    per_parameter: bool,
    output: Tensor,
    retain_graph: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Run one backward pass with ViViT.

    Args:
        extended: Extends a module.
        params: Parameters of the extended model, by name.
        extension: ViViT's extension.
        per_parameter: Keep the Gram matrices of parameters apart.
        output: The model's output ``[N, C]``, possibly through further extended modules.
        retain_graph: Whether another backward pass through the same graph follows.

    Yields:
        Names of parameters (empty for their sum) and Gram matrices ``[C, N, C, N]``.
    """
    hook = _GramsByParameter() if per_parameter else AccumulateGramHook()
    loss_func = extended(MSELoss(reduction="sum"))
    with backpack(extension, extension_hook=hook, retain_graph=retain_graph):
        loss = loss_func(output, torch.zeros_like(output))  # the target plays no part in the Hessian
        torch.autograd.grad(loss, list(params.values()), retain_graph=retain_graph)
    if isinstance(hook, _GramsByParameter):
        yield from ((name, hook.grams[id(p)]) for name, p in params.items())
    else:
        assert hook.gram is not None
        yield "", hook.gram


class _NamingViViT(ViViTGGNExact):
    """ViViT's extension, with errors that name the module they come from."""

    def __init__(self, model: Module) -> None:
        """Set up the extension.

        Args:
            model: The model whose modules it names.
        """
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}

    def __call__(self, module: Module, g_inp: tuple[Tensor, ...], g_out: tuple[Tensor, ...]) -> None:
        """Backpropagate through a module.

        Args:
            module: The module.
            g_inp: Gradients with respect to its inputs.
            g_out: Gradients with respect to its output.

        Raises:
            UnsupportedModelError: If BackPACK raises an error.
        """
        try:
            super().__call__(module, g_inp, g_out)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = f"BackPACK raised {type(error).__name__}: {error}".rstrip(".")
            raise UnsupportedModelError([Problem(self._names.get(module, ""), what, OTHER_METHOD)], _ROUTE) from error


class _GramsByParameter(AccumulateGramHook):
    """Keeps the Gram matrices of parameters apart.

    Attributes:
        grams: The Gram matrices ``[C, N, C, N]`` by the parameter's id.
    """

    def __init__(self) -> None:
        """Set up the hook."""
        super().__init__()
        self.grams: dict[int, Tensor] = {}

    def _accumulate(self, param: Tensor, gram: Tensor) -> None:
        """Keep one parameter's Gram matrix.

        Args:
            param: The parameter.
            gram: Its Gram matrix ``[C, N, C, N]``.
        """
        self.grams[id(param)] = gram


def _twin(module: Module, wanted: dict[int, str], params: dict[str, Parameter]) -> Module:
    """Build a twin of a module: the same layers on the same data, without its hooks.

    BackPACK's hooks and flags, the inputs and outputs it stores, gradients and Gram matrices all land on the
    twin, so the model itself is never touched.

    Args:
        module: The module.
        wanted: Names of the wanted parameters, by id; the twin's other parameters are frozen.
        params: Takes the twin's wanted parameters, by name.

    Returns:
        The twin.
    """
    twin = type(module).__new__(type(module))
    Module.__init__(twin)
    own_state = {*vars(twin), "_backpack_extend", "_compiled_call_impl"}
    vars(twin).update((name, value) for name, value in vars(module).items() if name not in own_state)
    memory_cleanup(twin)
    twin.training = module.training
    twin._buffers.update(module._buffers)
    for key, param in module._parameters.items():
        name = wanted.get(id(param))
        twin._parameters[key] = own = None if param is None else Parameter(param.detach(), name is not None)
        if name is not None and own is not None:
            params[name] = own
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else _twin(child, wanted, params)
    return twin


@contextmanager
def _backpack_session(dtype: torch.dtype) -> Iterator[Callable[[Module], Module]]:
    """Let BackPACK extend modules and store their inputs and outputs; undo what that does to the process.

    Args:
        dtype: The model's dtype. BackPACK's average pooling builds layers of the default dtype.

    Yields:
        A function that extends a module. What BackPACK stores on it is deleted at the end: it would keep the
        graph alive, and the graph the module.
    """
    store_io, default_dtype, handles = disable.store_io, torch.get_default_dtype(), len(CTX.hook_handles)
    roots: list[Module] = []

    def extended(module: Module) -> Module:
        roots.append(module)
        extend(module)
        return module

    disable.store_io = True
    torch.set_default_dtype(dtype)
    try:
        yield extended
    finally:
        disable.store_io = store_io
        torch.set_default_dtype(default_dtype)
        del CTX.hook_handles[handles:]
        for root in roots:
            for module in root.modules():
                memory_cleanup(module)
