"""The NTK read off ViViT's Gram matrices, in a user's own backward pass."""

from math import sqrt
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Size, Tensor
from torch.nn import Module, MSELoss
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.extensions.backpack_internals import active_extensions, quantities_of, set_active_extensions
from ggn_ntk.extensions.limits import VIVIT_CHECKS
from ggn_ntk.extensions.pass_check import ROUTE, Gradients, ModuleCall, PassCheck, call_problems, is_wanted
from ggn_ntk.models.requirements import BATCH_STATISTICS, find
from ggn_ntk.problem.errors import UnsupportedModelError
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import check_integer, check_split
from ggn_ntk.problem.result import finish
from ggn_ntk.process.torch_internals import AnyLoss, after_backward_pass, current_backward_pass

_SAVEFIELD = "vivit_ggn_exact"


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
    network without what was dropped. What ViViT passes back is compared with the gradients of the pass: where the two
    do not fit, say since something between extended modules is none, the pass ends with an error.

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
        self._grams = GramSum(delete_buffers)
        self._watch: _Watch | None = None
        self._loss: tuple[type[Module], str] | None = None
        self._hessian: float | None = None

    def __call__(self, module: Module) -> None:
        """Add a module's Gram matrices. BackPACK calls this in the backward pass.

        Args:
            module: The module that BackPACK has just finished with.

        Raises:
            RuntimeError: If the backward pass has more than one extended loss (BackPACK adds up what they
                backpropagate), or a parameter has no Gram matrix.
            UnsupportedModelError: If samples interact in the module, or it has options that BackPACK ignores. What
                does not fit the gradients raises it, too, at the end of the backward pass.
        """
        if isinstance(module, AnyLoss):
            self._start(module)
        else:
            self._add(module)

    def _start(self, loss: Any) -> None:
        """Begin a backward pass at its loss."""
        self.gram = None
        pass_id = current_backward_pass()
        if pass_id == self._pass_id:
            raise RuntimeError(
                "More than one extended loss in a backward pass: BackPACK adds up what they backpropagate, so the "
                "Gram matrix is that of none of them. Extend one loss only, or run one backward pass for each."
            )
        extensions = [e for e in active_extensions() if isinstance(e, ViViTGGNExact)]
        if not extensions:
            raise RuntimeError(
                "ViViT is not active. Activate it beside this hook: backpack(ViViTGGNExact(), extension_hook=hook)."
            )
        if any(len(quantities_of(extension.saved_quantities)) != 1 for extension in extensions):
            raise RuntimeError(
                "The ViViTGGNExact object holds quantities of another pass, which BackPACK would add to this one's. "
                "Create a new one for each pass."
            )
        self._grams, self._pass_id = GramSum(self.delete_buffers), pass_id
        self._loss, self._hessian = (type(loss), loss.reduction), _hessian(loss)
        self._dismiss()
        self._watch = _Watch(extensions[-1], loss, self._hessian)
        set_active_extensions((self._watch, *active_extensions()))
        after_backward_pass(lambda: self._finish(extensions))

    def _dismiss(self) -> None:
        """Take the watch out of BackPACK's active extensions, also if a pass that failed has left it there."""
        set_active_extensions(extension for extension in active_extensions() if extension is not self._watch)

    def _finish(self, extensions: list[ViViTGGNExact]) -> None:
        """Publish the sum at the end of a backward pass, if it was right."""
        self._dismiss()
        for (
            extension
        ) in extensions:  # what is left was passed back to the model's inputs: the next pass would add to it
            extension.saved_quantities = SavedQuantities()
        assert self._watch is not None
        check, self._watch = self._watch.check, None
        check.judge()
        self.gram = self._grams.gram

    def _add(self, module: Module) -> None:
        """Add the Gram matrices of a module's own parameters."""
        kind = type(module).__name__
        problems = list(find([BATCH_STATISTICS, *VIVIT_CHECKS], module, kind))
        if problems:
            raise UnsupportedModelError(problems, ROUTE)
        self._grams(module)

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
        assert self._hessian is not None
        num_outputs, n = self.gram.shape[:2]
        check_integer(n1)
        if n1 is not None:
            check_split(n1, n)
        kernel = kernel_block(self.gram, n1, self._hessian)
        return finish(kernel, AxesRequest.parse("full").resolve(Size([num_outputs])), symmetric=n1 is None)


class GramSum:
    """Sums ViViT's Gram matrices over the parameters of a backward pass, which is taken to be right.

    Attributes:
        gram: The sum ``[C, N, C, N]`` so far; ``None`` before the first parameter.
    """

    def __init__(self, delete_buffers: bool = True) -> None:
        """Begin with nothing; ``delete_buffers`` from each parameter once its Gram matrix is added."""
        self._delete_buffers = delete_buffers
        self.gram: Tensor | None = None

    def __call__(self, module: Module) -> None:
        """Add the Gram matrices of a module's own parameters. BackPACK may call this in the backward pass."""
        for name, param in _wanted(module).items():
            self._accumulate(param, self._gram_of(param, name))

    def _gram_of(self, param: Tensor, name: str) -> Tensor:
        """Evaluate the Gram matrix of a parameter, and free what ViViT stored for it."""
        # -> [C, N, C, N]
        if not hasattr(param, _SAVEFIELD):
            raise RuntimeError(
                f"ViViT has no Gram matrix for {name}. Register how to compute it with "
                "ViViTGGNExact.set_module_extension, or freeze the parameter."
            )
        gram: Tensor = getattr(param, _SAVEFIELD)["gram_mat"]().detach()
        if self._delete_buffers:
            delattr(param, _SAVEFIELD)
        return gram

    def _accumulate(self, param: Tensor, gram: Tensor) -> None:
        """Add the Gram matrix of one parameter to the sum."""
        self.gram = gram if self.gram is None else self.gram.add_(gram)


class _Watch(BackpropExtension):
    """Looks at what ViViT has passed back to each module, and at the gradient there, before ViViT goes on.

    Attributes:
        check: What it compares.
    """

    def __init__(self, vivit: ViViTGGNExact, loss: Any, hessian: float | None) -> None:
        """Begin at an extended loss, whose Hessian may be ``hessian`` times the identity."""
        super().__init__(savefield="", module_exts={})
        self.check = PassCheck(loss, 1.0 if hessian is None else sqrt(hessian))
        self._vivit, self._compares = vivit, hessian is not None

    def expects_backpropagation_quantities(self) -> bool:
        """Tell BackPACK that nothing is passed back."""
        return False

    @torch.no_grad()
    def __call__(self, module: Any, g_inp: Gradients, g_out: Gradients) -> None:
        """Look at a module. BackPACK calls this in the backward pass, before ViViT."""
        if isinstance(module, AnyLoss):
            return
        call = ModuleCall(module, g_inp, g_out)
        problems = list(call_problems(self.check, call, self._vivit.saved_quantities))
        if problems:
            raise UnsupportedModelError(problems, ROUTE)
        if self._compares:
            self._compare(call)
        self.check.add(call)

    def _compare(self, call: ModuleCall) -> None:
        """Compare what ViViT is going to use with the gradients."""
        s = self._vivit.saved_quantities.retrieve_quantity(call.output.data_ptr(), delete_old=False)  # [C, N, *output]
        samples = self._vivit.get_subsampling() or slice(None)
        # Without parameters, wrong numbers may do no harm. Where a ReLU comes before dropout, BackPACK takes all of its
        # zeros for dropped, also those that dropout keeps, but the ReLU passes nothing back to them anyway.
        if self.check.v is None or call.params:
            self.check.compare_output(call, s, samples)
        if call.has_drawn and is_wanted(call.inputs[0]):
            _, unknown = call.derivative()
            self.check.expect_known(call, unknown[samples], s)


def _wanted(module: Module) -> dict[str, Tensor]:
    """List a module's own parameters that require a gradient, by their label in a message."""
    named = module.named_parameters(recurse=False)
    return {f"{type(module).__name__}.{name}": p for name, p in named if p.requires_grad}


def _hessian(loss: Any) -> float | None:
    """Look up the number h of a loss Hessian h I; ``None`` for losses whose Hessian is another."""
    numbers = {"sum": 2.0, "mean": 2 / loss.input0.numel()}
    return numbers.get(loss.reduction) if type(loss) is MSELoss else None


def kernel_block(gram: Tensor, n1: int | None, hessian: float) -> Tensor:
    """Reorder, slice and rescale a Gram matrix to the block of x1 and x2."""
    # gram [C, N, C, N] -> [N1, N2, 1, C, C]
    kernel = gram.permute(1, 3, 0, 2).unsqueeze(2)  # cndm -> nmecd
    return (kernel if n1 is None else kernel[:n1, n1:]) / hessian
