"""The structured route as a BackPACK extension, for a training step of your own.

BackPACK calls the extension at each module of the backward pass, from the loss to the input (Dangel, Kunstner, Hennig:
"BackPACK: Packing more into backprop", ICLR 2020, section 2). What it passes back here is not a loss Hessian but ``s``,
the Jacobian of the model's outputs; it starts as the identity whatever the loss is.
"""

import itertools
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Size, Tensor
from torch.nn import Module
from torch.nn.modules.loss import _Loss

from ggn_ntk.axes import AxesRequest, OutputAxes
from ggn_ntk.checks import BATCH_STATISTICS, Problem, UnsupportedModelError, find, hidden_computation
from ggn_ntk.isolation import without_hooks
from ggn_ntk.layout import finish
from ggn_ntk.request import check_split
from ggn_ntk.rules import rule_for
from ggn_ntk.structured import Accumulator
from ggn_ntk.walk import Use, backpropagate, identity

_ROUTE = "NTK from this backward pass"
_REMEDY = "Use ggn_ntk.empirical_ntk"


class EmpiricalNTK(BackpropExtension):
    """BackPACK extension that contracts the empirical NTK of the batch during a backward pass.

    It takes no part in the gradients, and runs beside other extensions and with any extended loss:

    >>> from backpack import backpack, extend
    >>> from backpack.extensions import BatchGrad
    >>> from torch import nn
    >>> model, loss_func = extend(nn.Linear(4, 2)), extend(nn.CrossEntropyLoss())
    >>> extension = EmpiricalNTK(n1=3)
    >>> with backpack(extension, BatchGrad()):
    ...     loss_func(model(torch.randn(5, 4)), torch.randint(2, (5,))).backward()
    >>> extension.ntk().shape  # the first three samples against the other two
    torch.Size([3, 2, 2, 2])

    The kernel is that of the parameters that require a gradient, in extended modules, and of the network as it ran.
    Each backward pass starts afresh, at its loss. A layer of your own needs a rule
    (:func:`ggn_ntk.register_rule`), or a BackPACK module extension (``set_module_extension``) whose methods for
    parameters return a :class:`ggn_ntk.Factored`, and whose ``backpropagate`` passes ``s`` ``[C, N, ...]`` back.
    """

    def __init__(self, n1: int | None = None, *, compute: str = "full", per_parameter: bool = False) -> None:
        """Set up the extension.

        Args:
            n1: How many leading samples of the batch are x1, the others x2. ``None``: all of them are both.
            compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
            per_parameter: Also store each parameter's kernel as its attribute ``empirical_ntk``.

        Raises:
            ValueError: If ``compute`` is not one of these.
        """
        super().__init__(savefield="empirical_ntk", module_exts={})
        self._requested = AxesRequest.parse(compute)
        self.n1, self.compute, self.per_parameter = n1, compute, per_parameter
        self._pass_id: int | None = None
        self._axes = OutputAxes(Size())
        self._seen: dict[str, Tensor] = {}
        self._accumulator = Accumulator(self._axes.roles, n1, per_parameter)
        self._ended = False

    def expects_backpropagation_quantities(self) -> bool:
        """Tell BackPACK that something is passed back.

        Returns:
            ``True``.
        """
        return True

    def accumulate_backpropagated_quantities(self, existing: Tensor, other: Tensor) -> Tensor:
        """Add what several modules pass back to one tensor.

        Args:
            existing: ``s`` of one module's input.
            other: ``s`` of another's.

        Returns:
            Their sum.
        """
        return existing + other

    def ntk(self) -> Tensor:
        """Return the kernel of the last backward pass.

        Returns:
            ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``, as the extension computes; for ``n1=None``,
            x1 and x2 are the whole batch, and the kernel is exactly symmetric.

        Raises:
            RuntimeError: If no backward pass has ended, or none had a parameter to differentiate.
        """
        if not self._ended:
            raise RuntimeError(
                "No kernel yet: run a backward pass through an extended model and loss inside "
                "`with backpack(extension):` first."
            )
        if not self._accumulator.kernels:
            raise RuntimeError("No kernel: no extended module of the pass has a parameter that requires a gradient.")
        return self._finished(torch.stack(list(self._accumulator.kernels.values())).sum(0))

    def _finished(self, kernel: Tensor) -> Tensor:
        """Bring a kernel to the layout of the public API.

        Args:
            kernel: ``[N1, N2, E, F, F]``.

        Returns:
            The kernel with the output's axes.
        """
        return finish(kernel, self._axes, self.n1 is None)

    @torch.no_grad()
    def __call__(self, module: Module, g_inp: tuple[Tensor, ...], g_out: tuple[Tensor, ...]) -> None:
        """Process a module. BackPACK calls this in the backward pass.

        Args:
            module: The module.
            g_inp: Gradients with respect to its inputs.
            g_out: Gradients with respect to its output.
        """
        if isinstance(module, _Loss):
            self._start(module)
        else:
            self._pass_back(module, g_inp, g_out)

    def _start(self, loss: Any) -> None:
        """Begin a backward pass.

        Args:
            loss: The extended loss it begins at.

        Raises:
            RuntimeError: If it began before, at another loss.
        """
        self._ended = False
        pass_id = torch._C._current_graph_task_id()
        if pass_id == self._pass_id:
            raise RuntimeError(
                "More than one extended loss in a backward pass: their outputs would be added up. Extend one loss "
                "only, or run one backward pass for each."
            )
        if self.n1 is not None:
            check_split(self.n1, len(loss.input0))
        self._pass_id, self._seen = pass_id, {}
        self._axes = self._requested.resolve(loss.input0.shape[1:])
        self.saved_quantities = SavedQuantities()
        self._accumulator = Accumulator(self._axes.roles, self.n1, self.per_parameter)
        self._save(loss.input0, identity(loss.input0))
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        """Publish the kernels at the end of a backward pass; one that fails half-way never gets here."""
        if self.per_parameter:
            for name, kernel in self._accumulator.kernels.items():
                setattr(self._seen[name], self.savefield, self._finished(kernel))
        self.saved_quantities, self._seen, self._ended = SavedQuantities(), {}, True

    def _pass_back(self, module: Any, g_inp: tuple[Tensor, ...], g_out: tuple[Tensor, ...]) -> None:
        """Add a module's parameters and pass ``s`` on to its inputs.

        Args:
            module: The module.
            g_inp: Gradients with respect to its inputs.
            g_out: Gradients with respect to its output.

        Raises:
            UnsupportedModelError: If the module cannot be processed.
        """
        params = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        own = self._BackpropExtension__module_extensions.get(type(module))
        problems = self._problems(module, params, own is not None)
        if problems:
            raise UnsupportedModelError(problems, _ROUTE)
        self._seen.update((str(id(p)), p) for p in params.values())
        if own is not None:
            own(self, module, g_inp, g_out)
            self._accumulator.add({str(id(p)): vars(p).pop(self.savefield) for p in params.values()})
            return
        s = self.saved_quantities.retrieve_quantity(module.output.data_ptr(), delete_old=True)
        inputs = _inputs(module)
        with without_hooks(module):
            if params:
                rule = rule_for(module)
                assert rule is not None
                factored = rule(module, inputs[0] if len(inputs) == 1 else inputs, s)
                self._accumulator.add({str(id(p)): factored[name] for name, p in params.items()})
            wanted = [x for x in inputs if x.requires_grad]
            if len(inputs) == 1 and wanted:
                self._save(inputs[0], backpropagate(Use(module, inputs[0], {}), s))
            elif wanted:
                for x, passed in zip(wanted, _pass_to_several(module, inputs, s), strict=True):
                    self._save(x, passed)

    def _problems(self, module: Any, params: dict[str, Any], has_own: bool) -> list[Problem]:
        """Find what keeps a module from being processed.

        Args:
            module: The module.
            params: Its wanted parameters.
            has_own: Whether the user has registered a module extension for it.

        Returns:
            The problems.
        """
        kind = type(module).__name__
        problems = [*find([BATCH_STATISTICS], module, kind), *hidden_computation(module, kind)]
        for name, p in params.items():
            if str(id(p)) in self._seen:
                what = "it is used more than once, and s of its first use is gone"
                problems.append(Problem(f"{kind}.{name}", what, _REMEDY))
        if params and not has_own and rule_for(module) is None:
            problems.append(Problem(kind, f"no rule is registered for {kind}", f"Write one with register_rule({kind})"))
        if any(True for _ in module.children()):
            problems.append(Problem(kind, f"{kind} may compute between its modules what BackPACK cannot see", _REMEDY))
        elif module.output.data_ptr() not in self.saved_quantities._saved_quantities:
            what = "nothing was passed back to its output: something behind it is not an extended module"
            problems.append(Problem(kind, what, _REMEDY))
        return problems

    def _save(self, x: Tensor, s: Tensor) -> None:
        """Keep ``s`` of a tensor for the module that made it.

        Args:
            x: The tensor.
            s: ``[C, N, ...]``.
        """
        self.saved_quantities.save_quantity(x.data_ptr(), s, self.accumulate_backpropagated_quantities)


def _inputs(module: Module) -> tuple[Tensor, ...]:
    """Collect the inputs that BackPACK has stored on a module.

    Args:
        module: The module.

    Returns:
        Its inputs.
    """
    names = itertools.takewhile(lambda name: hasattr(module, name), (f"input{i}" for i in itertools.count()))
    return tuple(getattr(module, name) for name in names)


def _pass_to_several(module: Module, inputs: tuple[Tensor, ...], s: Tensor) -> list[Tensor]:
    """Pass ``s`` back to the inputs of a module with several, with autograd.

    Args:
        module: The module.
        inputs: Its inputs.
        s: ``[C, N, *module output]``.

    Returns:
        ``[C, N, *input]`` for each input that requires a gradient, with memory of its own.
    """
    with torch.enable_grad():
        copies = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        output = module(*copies)
    wanted = [x for x in copies if x.requires_grad]
    return [product.clone() for product in torch.autograd.grad(output, wanted, s, is_grads_batched=True)]
