"""A kernel that is computed again and again, say at each step of training: the model is looked at once."""

import inspect
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.contraction.tape import Tapes
from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.kernels.ntk import compute_kernels, empirical_ntk, parse_method
from ggn_ntk.methods.computation import is_finite, session
from ggn_ntk.methods.structured import repeated_kernels
from ggn_ntk.models.isolation import plain_torch
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.models.structure import form_of, structure_of
from ggn_ntk.problem.errors import NoTensorError, NotFiniteError
from ggn_ntk.problem.functions import Model
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Kernels
from ggn_ntk.process.transforms import outside_of_transforms

# Of how many forms of samples what was learnt is kept.
_FORMS = 64


class PreparedKernel:
    """The empirical NTK of a model, as a function of samples: what :func:`ggn_ntk.empirical_ntk_fn` returns."""

    def __init__(self, model: Model, keywords: dict[str, Any]) -> None:
        """Check what is asked for, as far as that takes no samples."""
        self._model, self._keywords = model, keywords
        self._check: bool = keywords.pop("check")
        self._method = parse_method(keywords.pop("method"), self._check, keywords["capture"])
        of_axes = inspect.signature(AxesRequest.parse).parameters
        self._axes = AxesRequest.parse(**{name: keywords.pop(name) for name in of_axes})
        if isinstance(keywords["params"], Iterator):
            keywords["params"] = list(keywords["params"])
        self._known: dict[Hashable, Plans] = {}
        self._tapes = Tapes()

    def __call__(self, x1: Any, x2: Any = None, *, verify: bool = False) -> Tensor | dict[Any, Any]:
        """Compute the kernel at the parameters' current values.

        Args:
            x1: N1 samples, as for :func:`ggn_ntk.empirical_ntk`.
            x2: N2 samples like x1; ``None`` for x1.
            verify: Verify everything once more, also if it was for samples of these shapes.

        Returns:
            What :func:`ggn_ntk.empirical_ntk` returns, to the last bit.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        if not isinstance(verify, bool):
            raise TypeError(f"verify must be True or False, got {type(verify).__name__}.")
        request = Request.parse(self._model, x1, x2, self._axes, **self._keywords)
        form = self._form(request)
        if verify:
            self._tapes.forget(form)
        elif form in self._known:
            result = self._repeated(request, form)
            if result is not None and is_finite(result):
                return result
        self._known.pop(form, None)
        result, computed = of_all_outputs(request, lambda r: compute_kernels(r, self._method, self._check))
        if isinstance(computed.plans, Plans) and is_finite(result):
            if len(self._known) >= _FORMS:
                self._known.clear()
            self._known[form] = computed.plans.without_samples()
        return result

    def _form(self, request: Request) -> Hashable:
        """Describe what the verification of a kernel depends on."""
        return structure_of(request.model, request.params), len(request.batches), *map(form_of, request.sets)

    def _repeated(self, request: Request, form: Hashable) -> Kernels | None:
        """Compute kernels with what is known; ``None`` where that does not hold."""
        known, model, found = self._known[form], request.model, dict[str, Tensor]()
        request = replace(request, outputs=known.request.outputs)  # joined, where there are several

        def compute() -> None:
            with session(request):
                try:
                    computed = repeated_kernels(request, known)
                except (NotFiniteError, NoTensorError):
                    return
                if computed is not None:
                    found.update(request.finished(computed.kernels, computed.axes))

        if known.follows_shapes:
            inputs = [t for x in request.sets for t in x.tensors.values()] + [*model.parameters(), *model.buffers()]
            with outside_of_transforms(), plain_torch(model), torch.no_grad():
                self._tapes.run(form, inputs, found, compute)
        else:
            compute()
        return request.by_name(found) if found else None


def empirical_ntk_fn(model: Model, **keywords: Any) -> PreparedKernel:
    """Prepare the empirical neural tangent kernel of a model, to compute it again and again.

    Say at each step of training, to see how it changes (Fort, Dziugaite, Paul, Kharaghani, Roy, Ganguli: "Deep learning
    versus kernel learning", NeurIPS 2020).

    The first call for samples of some shapes verifies all that :func:`ggn_ntk.empirical_ntk` does, and takes as long.
    Those after it take what was learnt for granted: which rules are right, where parameters are used, that samples
    leave one another alone. They follow the parameters' values, however these change. All else that verification
    depends on is compared at each call: types and options of modules, hooks, training flags, which parameters require a
    gradient, registered rules, shapes and dtypes. Where something differs, where the model computes something else than
    before, and where a kernel is not finite, everything is verified anew. What does not show are samples that influence
    one another at some values alone, say beyond a threshold: ``verify=True`` looks for these.

    Only ``method="structured"``, and ``"auto"`` where it takes that, have something to keep; other methods check at
    each call.

    Args:
        model: See :func:`ggn_ntk.empirical_ntk`.
        **keywords: The keywords of :func:`ggn_ntk.empirical_ntk`. With ``check=True`` a block is compared with an
            independent computation whenever everything is verified.

    Returns:
        A function ``(x1, x2=None, *, verify=False)`` that returns what :func:`ggn_ntk.empirical_ntk` does, say
        ``[N1, N2, *out, *out]``, to the last bit.

    Raises:
        TypeError: If a keyword is none of :func:`ggn_ntk.empirical_ntk`'s, or of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    accepted = {name: p for name, p in inspect.signature(empirical_ntk).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = keywords.keys() - accepted.keys()
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise TypeError(
            f"empirical_ntk_fn takes the keywords of empirical_ntk, got {listed}. These are {', '.join(accepted)}."
        )
    return PreparedKernel(model, {name: keywords.get(name, p.default) for name, p in accepted.items()})
