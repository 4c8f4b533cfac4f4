"""The structured route as a BackPACK extension, for a training step of your own.

BackPACK calls the extension at each module of the backward pass, from the loss to the input (Dangel, Kunstner, Hennig:
"BackPACK: Packing more into backprop", ICLR 2020, section 2). What it passes back here is not a loss Hessian but ``s``,
the Jacobian of the model's outputs; it starts as the identity whatever the loss is. The gradients of the pass show
whether it is right (:mod:`ggn_ntk.extensions.pass_check`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Size, Tensor, nn
from torch.nn import Module

from ggn_ntk.contraction.accumulator import Accumulator
from ggn_ntk.extensions.backpack_internals import module_extensions, quantities_of
from ggn_ntk.extensions.pass_check import (
    REMEDY,
    ROUTE,
    Gradients,
    ModuleCall,
    PassCheck,
    call_problems,
    gradients_at,
    is_output,
    is_wanted,
)
from ggn_ntk.jacobians.backward import identity
from ggn_ntk.jacobians.layers import Use, backpropagate
from ggn_ntk.models.entries import global_generators
from ggn_ntk.models.inspection import OwnGenerator
from ggn_ntk.models.requirements import BATCH_STATISTICS, find, hidden_computation
from ggn_ntk.models.state import State
from ggn_ntk.problem.errors import Problem, UnsupportedModelError
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import check_integer, check_split
from ggn_ntk.problem.result import finish
from ggn_ntk.process.torch_internals import (
    AnyLoss,
    after_backward_pass,
    buffers_of,
    current_backward_pass,
    parameters_of,
)
from ggn_ntk.process.transforms import batched_gradients
from ggn_ntk.rules.activation import multiply_entries
from ggn_ntk.rules.registry import acts_on_each_sample, backpropagation_for, batched_vjp, rule_for

# Layers of torch that may draw other random numbers.
_DRAWS = (nn.RNNBase, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


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

    The kernel is that of the parameters that require a gradient, in extended modules, and of the network as it ran:
    with active dropout, of the network without what was dropped. Each backward pass starts afresh, at its loss. What
    is passed back is compared with the gradients of the pass: where the two do not fit, say since something between
    extended modules is none, the pass ends with an error. A layer of your own needs a rule
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
            TypeError: If ``n1`` is not an integer, or ``per_parameter`` not ``True`` or ``False``.
            ValueError: If ``compute`` is not one of these.
        """
        super().__init__(savefield="empirical_ntk", module_exts={})
        self._requested = AxesRequest.parse(compute)
        check_integer(n1)
        if not isinstance(per_parameter, bool):  # there are no kernels of modules here
            raise TypeError(f"per_parameter must be True or False, got {per_parameter!r}.")
        self.n1, self.compute, self.per_parameter = n1, compute, per_parameter
        self._pass_id: int | None = None
        self._check: PassCheck | None = None
        self._axes = self._requested.resolve(Size())
        self._seen: dict[str, Tensor] = {}
        self._accumulator = Accumulator(self._axes.first.roles, n1, self._group)
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

    def _group(self, name: str) -> str:
        """Name the kernel that a parameter counts for."""
        return name if self.per_parameter else ""

    def _finished(self, kernel: Tensor) -> Tensor:
        """Bring a kernel to the layout of the public API."""
        # kernel [N1, N2, E, F, F]
        return finish(kernel, self._axes, self.n1 is None)

    @torch.no_grad()
    def __call__(self, module: Module, g_inp: Gradients, g_out: Gradients) -> None:
        """Process a module. BackPACK calls this in the backward pass.

        Args:
            module: The module.
            g_inp: Gradients with respect to its inputs.
            g_out: Gradients with respect to its output.
        """
        try:
            if isinstance(module, AnyLoss):
                self._start(module)
            else:
                self._pass_back(ModuleCall(module, g_inp, g_out))
        except Exception:
            self._forget()
            raise

    def _start(self, loss: Any) -> None:
        """Begin a backward pass at its loss, with the identity."""
        self._ended = False
        pass_id = current_backward_pass()
        if pass_id == self._pass_id:
            raise RuntimeError(
                "More than one extended loss in a backward pass: their outputs would be added up. Extend one loss "
                "only, or run one backward pass for each."
            )
        self._forget()
        check = PassCheck(loss)
        if self.n1 is not None:
            check_split(self.n1, len(loss.input0))
        self._pass_id, self._check = pass_id, check
        self._axes = self._requested.resolve(loss.input0.shape[1:])
        self._accumulator = Accumulator(self._axes.first.roles, self.n1, self._group)
        self._save(loss.input0, identity(loss.input0))
        after_backward_pass(self._finish)

    def _forget(self) -> None:
        """Drop what is kept for modules that the backward pass has not reached."""
        self.saved_quantities, self._seen, self._check = SavedQuantities(), {}, None

    def _finish(self) -> None:
        """Publish the kernels at the end of a backward pass, if it was right."""
        check, seen = self._check, self._seen
        self._forget()
        assert check is not None
        check.judge()
        if self.per_parameter:
            for name, kernel in self._accumulator.kernels.items():
                setattr(seen[name], self.savefield, self._finished(kernel))
        self._ended = True

    def _pass_back(self, call: ModuleCall) -> None:
        """Add a module's parameters and pass ``s`` on to its inputs."""
        own = module_extensions(self).get(type(call.module))
        problems = self._problems(call, own is not None)
        if problems:
            raise UnsupportedModelError(problems, ROUTE)
        assert self._check is not None
        s = self.saved_quantities.retrieve_quantity(call.output.data_ptr(), delete_old=own is None)  # [C, N, *output]
        self._check.compare_output(call, s)
        self._seen.update((str(id(p)), p) for p in call.params.values())
        if own is None:
            stand_in = _stand_in(call.module)
            with _left_as_found(call):
                self._add_parameters(call, stand_in, s)
                self._pass_on(call, stand_in, s)
        else:
            own(self, call.module, call.g_inp, call.g_out)
            self._accumulator.add({str(id(p)): [vars(p).pop(self.savefield)] for p in call.params.values()})
            self._keep_apart(call)
        self._check.add(call)

    def _problems(self, call: ModuleCall, has_own: bool) -> list[Problem]:
        """Find what keeps a module from being processed."""
        module, kind = call.module, call.kind
        problems = [*find([BATCH_STATISTICS], module, kind), *hidden_computation(module, kind)]
        if call.params and not has_own and rule_for(module) is None:
            problems.append(Problem(kind, f"no rule is registered for {kind}", f"Write one with register_rule({kind})"))
        if any(True for _ in module.children()):
            problems.append(Problem(kind, f"{kind} may compute between its modules what BackPACK cannot see", REMEDY))
        else:
            problems += call_problems(self._check, call, self.saved_quantities)
        return problems

    def _add_parameters(self, call: ModuleCall, stand_in: Any, s: Tensor) -> None:
        """Add the Jacobians of a module's parameters, by its rule."""
        if call.params:
            rule = rule_for(call.module)
            assert rule is not None
            factored = rule(stand_in, call.inputs[0] if len(call.inputs) == 1 else call.inputs, s)
            self._accumulator.add({str(id(p)): [factored[name]] for name, p in call.params.items()})

    def _pass_on(self, call: ModuleCall, stand_in: Any, s: Tensor) -> None:
        """Pass ``s`` on to a module's inputs."""
        # s [C, N, *module output] -> [C, N, *module input]
        assert self._check is not None
        wanted = [i for i, x in enumerate(call.inputs) if is_wanted(x) and call.leads_with_samples(x)]
        if not wanted:
            return
        if call.has_drawn:  # another evaluation would draw other numbers: the derivative is read off the call
            derivative, unknown = call.derivative()
            self._check.expect_known(call, unknown, s)
            passed = [multiply_entries(s, derivative)]
        elif len(call.inputs) == 1 and backpropagation_for(stand_in).function is not batched_vjp:
            passed = [backpropagate(Use(stand_in, call.inputs[0], {}), s)]
        else:
            passed = self._pass_through_autograd(call, stand_in, wanted, s)
        for i, product in zip(wanted, passed, strict=True):
            if is_output(call.inputs[i]):
                self._save(call.inputs[i], product)
            else:  # no module asks for it, but it may show that the parameters of this one are wrong
                self._check.compare_input(call, i, product)

    def _pass_through_autograd(self, call: ModuleCall, stand_in: Any, wanted: list[int], s: Tensor) -> list[Tensor]:
        """Pass ``s`` back through a module without a formula, to wanted inputs, by evaluating it once more."""
        assert self._check is not None
        with torch.enable_grad():
            inputs = [x.detach() if isinstance(x, Tensor) else x for x in call.inputs]
            leaves = [inputs[i].requires_grad_() for i in wanted]
            output = stand_in(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))  # it may work in place
        output = output[0] if isinstance(output, tuple) else output
        passed = _vjp(output, leaves, s)
        self._check.expect_repeated(call, wanted, output, leaves)
        if not acts_on_each_sample(call.module):
            self._check.expect_independence(call, output, leaves)
        self._check.allow_rounding(call, wanted, passed)
        return passed

    def _keep_apart(self, call: ModuleCall) -> None:
        """Copy what a module extension of the user has passed back, which may be one tensor for several inputs."""
        # Formulas of modules further back may write to it in place.
        saved = quantities_of(self.saved_quantities)
        for key in {x.data_ptr() for x in call.inputs if is_wanted(x)}:
            saved[key] = None if saved.get(key) is None else saved[key].clone()

    def _save(self, x: Tensor, s: Tensor) -> None:
        """Keep ``s`` of a tensor for the module that made it."""
        # s [C, N, ...]
        self.saved_quantities.save_quantity(x.data_ptr(), s, self.accumulate_backpropagated_quantities)


def _is_of_torch(module: Module) -> bool:
    """Tell whether a module's type is one of torch's layers."""
    return type(module).__module__.startswith("torch.nn.")


def _stand_in(module: Any) -> Any:
    """Copy a module to evaluate it once more: with the same parameters, with copies of buffers, without hooks."""
    twin: Any = object.__new__(type(module))
    Module.__init__(twin)
    left_out = vars(twin).keys() | {"output"}  # and the inputs that BackPACK has stored
    for name, value in vars(module).items():
        if name not in left_out and not (name.startswith("input") and name[5:].isdigit()):
            vars(twin)[name] = value
    twin.training = module.training
    parameters_of(twin).update(parameters_of(module))
    buffers = {name: None if b is None else b.clone() for name, b in buffers_of(module).items()}
    buffers_of(twin).update(buffers)
    return twin


@contextmanager
def _left_as_found(call: ModuleCall) -> Iterator[None]:
    """Put back what an evaluation of a module may change: the generators of the process, and what it holds."""
    # Torch's own layers change nothing, but for those that draw.
    if _is_of_torch(call.module) and not isinstance(call.module, _DRAWS):
        yield
        return
    generators = global_generators()
    state = State([call.module], thorough=True)
    try:
        with OwnGenerator():
            yield
    finally:
        state.restore()
        for generator in generators:
            if generator.changed():
                generator.put_back()


def _vjp(output: Tensor, leaves: list[Tensor], s: Tensor) -> list[Tensor]:
    """Multiply by a transposed Jacobian with autograd."""
    # s [C, *output] -> [C, *leaf] for each leaf
    passed: Any
    try:
        passed = batched_gradients(output, leaves, s, allow_unused=True)
    except RuntimeError:  # no batching rule for an operation
        rows = [gradients_at(output, leaves, entry) for entry in s]
        passed = [torch.stack(column) for column in zip(*rows, strict=True)]
    zeros = [s.new_zeros(len(s), *leaf.shape) for leaf in leaves]
    return [zero if product is None else product.clone() for product, zero in zip(passed, zeros, strict=True)]
