"""The structured route: layer by layer, the x1-x2 block alone, in the cheapest order.

From the output back to the input, ``s = d f / d (layer output)`` passes through one layer after the other. At each
layer with wanted parameters, a rule writes their Jacobians as einsums of the layer's input and ``s``, and these are
contracted to the block of the kernel; then ``s`` moves on, and what belongs to the layer is freed. Up to the last
nonlinearity ``s`` is the same for all samples, and is kept once.

No rule is trusted: on a few samples, the Jacobians that the rules write are compared with autograd's.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.nn import Module

from ggn_ntk.blocks import SIZE_ELSEWHERE, SIZES, WAITING, Joined, split
from ggn_ntk.checks import (
    OTHER_METHOD,
    PROBE_TOLERANCES,
    TRIES,
    Problem,
    UnsupportedModelError,
    configuration_problems,
    cotangent,
    eager,
    gradient_error,
    gradients,
    hidden_computation,
    output_problem,
    random_state,
)
from ggn_ntk.contraction import add_products
from ggn_ntk.doubling import Doubled, Part, contract_into, double, parts, select_samples, squared_norm
from ggn_ntk.request import Request
from ggn_ntk.rules import Factored, backpropagation_for, channels_last, rule_for

_ROUTE = "structured empirical NTK"

# How many samples the probe takes.
_PROBED = 2


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        module: The layer.
        x: Its input ``[N, ...]``; a tuple where it takes several.
        params: Its wanted parameters: their names on the layer, and those users know them by.
    """

    module: Module
    x: Any
    params: dict[str, str]

    def restrict(self, samples: slice) -> "Use":
        """Select samples.

        Args:
            samples: Which samples.

        Returns:
            The use of the layer by these samples.
        """
        x = tuple(x[samples] for x in self.x) if isinstance(self.x, tuple) else self.x[samples]
        return self._replace(x=x)


def structured_kernels(request: Request) -> tuple[Size, Iterable[tuple[str, Tensor]]]:
    """Compute kernels layer by layer. Call it inside ``isolated(request.model)``.

    Args:
        request: The request.

    Returns:
        The shape ``[*out]`` of one sample's output; names of parameters (empty for their sum) and kernels over
        flattened outputs.

    Raises:
        UnsupportedModelError: If the model has no exact kernel, or this route does not get it right.
    """
    _check_structure(request)
    for seed in range(TRIES):
        out_shape, kernels, problems = _attempt(request, seed)
        if not problems:
            return out_shape, kernels.items()
    raise UnsupportedModelError(problems, _ROUTE)


@torch.no_grad()
def _attempt(request: Request, seed: int) -> tuple[Size, dict[str, Tensor], list[Problem]]:
    """Compute kernels and probe them. Rounding may take a probed sample to the other side of a kink.

    Args:
        request: The request.
        seed: Seed of the probe.

    Returns:
        The shape ``[*out]`` of one sample's output, kernels by name (empty for their sum), and problems.

    Raises:
        UnsupportedModelError: If the output cannot be differentiated.
    """
    before = random_state(request.model)
    uses, output = _forward(request)
    problem = output_problem(output, before == random_state(request.model), sum(request.sizes))
    if problem is not None:
        raise UnsupportedModelError([problem], _ROUTE)
    probe = _Probe(request, output, seed)
    accumulator = Accumulator(request.compute, request.n1, request.per_parameter, _counts(uses))
    _backward(uses, output, probe, accumulator)
    return output.shape[1:], accumulator.kernels, list(probe.problems())


def recorded_products(request: Request) -> list[tuple[str, Doubled]]:
    """List the products of Jacobians that :func:`structured_kernels` would contract.

    Args:
        request: The request.

    Returns:
        Names of parameters and products; none is contracted.

    """
    _check_structure(request)
    with torch.no_grad():
        uses, output = _forward(request)
        recorder = _Recorder(request.compute, request.n1, True, _counts(uses))
        _backward(uses, output, None, recorder)
    return recorder.products


def _check_structure(request: Request) -> None:
    """Raise unless the model can be taken apart into layers that have rules.

    Args:
        request: The request.

    Raises:
        UnsupportedModelError: If it cannot.
    """
    problems = [*configuration_problems(request), *_structure_problems(request)]
    if problems:
        raise UnsupportedModelError(problems, _ROUTE)


def _structure_problems(request: Request) -> Iterator[Problem]:
    """Find what keeps a model from being taken apart into layers.

    Args:
        request: The request.

    Yields:
        The problems.
    """
    if request.x1.kwargs:
        yield Problem("", "it is called with keyword arguments, which layers do not pass on", OTHER_METHOD)
    wanted = {id(p) for p in request.params.values()}
    for name, module in _named_layers(eager(request.model)):
        yield from hidden_computation(module, name)
        has_wanted = any(id(p) in wanted for p in module.parameters(recurse=_is_layer(module)))
        if not has_wanted:
            continue
        kind = type(module).__name__
        if not _is_layer(module):
            yield Problem(name, f"{kind} has a parameter of its own", OTHER_METHOD)
        elif rule_for(module) is None and any(True for _ in module.children()):
            what = f"{kind} may compute between its modules what the route cannot see"
            yield Problem(name, what, "Build the model from nn.Sequential alone, or use another method")
        elif rule_for(module) is None:
            what = f"no rule is registered for {kind}"
            yield Problem(name, what, f"Write one with ggn_ntk.register_rule({kind}), or use another method")


def _is_layer(module: Module) -> bool:
    """Tell layers from containers that call their children one after the other.

    Args:
        module: The module.

    Returns:
        Whether it is a layer.
    """
    return not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward


def _named_layers(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """List a model's containers and layers, these in the order of their calls.

    Args:
        module: The model.
        name: Its dotted name.

    Yields:
        Dotted names and modules; a layer that is called several times comes as often.
    """
    yield name, module
    if not _is_layer(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from _named_layers(child, f"{name}.{key}".lstrip("."))


def _forward(request: Request) -> tuple[list[Use], Any]:
    """Evaluate the model on all samples and record the input of each layer.

    Args:
        request: The request.

    Returns:
        The uses of layers in the order of their calls, and the output.

    Raises:
        UnsupportedModelError: If a layer in between returns no tensor.
    """
    names = {id(p): name for name, p in request.params.items()}
    args = tuple(channels_last(x) for x in request.x1.stack(request.x2).args)
    uses: list[Use] = []
    for name, layer in _named_layers(eager(request.model)):
        if not _is_layer(layer):
            continue
        if not all(isinstance(x, Tensor) for x in args):
            what = f"{type(layer).__name__} takes {type(args[0]).__name__}, not a tensor, from the layer before"
            raise UnsupportedModelError([Problem(name, what, OTHER_METHOD)], _ROUTE)
        params = layer.named_parameters(recurse=False, remove_duplicate=False)
        wanted = {key: names[id(p)] for key, p in params if id(p) in names}
        uses.append(Use(layer, args[0] if len(args) == 1 else args, wanted))
        args = (layer(*(x.clone() if _may_overwrite(layer) else x for x in args)),)
    return uses, args[0]


def _may_overwrite(layer: Module) -> bool:
    """Tell whether a layer may work in place, on the recorded output of the layer before.

    Args:
        layer: The layer.

    Returns:
        Whether it is set to, or is not one of torch's.
    """
    return getattr(layer, "inplace", False) or not type(layer).__module__.startswith("torch.nn.")


def _counts(uses: list[Use]) -> Counter[str]:
    """Count the uses of parameters.

    Args:
        uses: The uses of layers.

    Returns:
        How often each wanted parameter is used, by name.
    """
    return Counter(name for use in uses for name in use.params.values())


def _backward(uses: list[Use], output: Tensor, probe: "_Probe | None", accumulator: "Accumulator") -> None:
    """Pass ``s`` back and contract Jacobians on the way.

    Args:
        uses: The uses of layers; emptied, so that inputs are freed on the way.
        output: The model's output ``[N, *out]``.
        probe: Compares each Jacobian, if there is one.
        accumulator: Takes each Jacobian.
    """
    s = identity(output)
    while _any_wanted(uses):
        blocks = _blocks(uses, s)
        if len(blocks) > 1 and probe is not None:  # without a probe, products of whole layers are to be recorded
            s = _pass_in_blocks(uses, s, blocks, probe, accumulator)
        else:
            s = _pass_all(uses, s, probe, accumulator)


def _any_wanted(uses: list[Use]) -> bool:
    """Tell whether ``s`` has to pass further back.

    Args:
        uses: The uses of layers that it has not passed.

    Returns:
        Whether one of them has a wanted parameter.
    """
    return any(use.params for use in uses)


def _pass_all(uses: list[Use], s: Tensor, probe: "_Probe | None", accumulator: "Accumulator") -> Tensor:
    """Pass ``s`` of all samples back through the last layer.

    Args:
        uses: The uses of layers; the last is removed, so that its input is freed.
        s: ``[C, N, *layer output]``; may be overwritten.
        probe: Compares each Jacobian, if there is one.
        accumulator: Takes each Jacobian.

    Returns:
        ``[C, N, *layer input]``, unless no layer before needs it.
    """
    use = uses.pop()
    if use.params:
        jacobians = _jacobians(use, s)
        if probe is not None:
            probe.add(jacobians)
        accumulator.add(jacobians)
        del jacobians  # frees its operands, but for those of parameters that are used again
    if not _any_wanted(uses):
        return s
    waits = any(accumulator.is_reused(name) for name in use.params.values()) and s.stride(1) != 0
    return backpropagate(use, s.clone() if waits else s)  # which may overwrite it


def _blocks(uses: list[Use], s: Tensor) -> list[slice]:
    """Split samples for the way back through the last layers.

    Args:
        uses: The uses of layers.
        s: ``[C, N, *layer output]``.

    Returns:
        The blocks: a single one while ``s`` is the same for all samples, which is cheaper than any block.
    """
    n, use = s.shape[1], uses[-1]
    if s.stride(1) == 0 and (use.params or backpropagation_for(use.module).linear):
        return split(n, n)
    sizes = [x[0].numel() for use in uses for x in (use.x if isinstance(use.x, tuple) else (use.x,))]
    block = SIZES.get(s.device.type, SIZE_ELSEWHERE) // (len(s) * max(sizes))
    threads = torch.get_num_threads()  # each takes as many products of a batch
    return split(n, ceil(block / threads) * threads)


def _pass_in_blocks(
    uses: list[Use], s: Tensor, blocks: list[slice], probe: "_Probe", accumulator: "Accumulator"
) -> Tensor:
    """Pass ``s`` of one block of samples after the other back through a chain of layers.

    How many layers the chain has turns out at the first block: as many as let no more wait for the other blocks than
    there is room for.

    Args:
        uses: The uses of layers; those passed are removed.
        s: ``[C, N, *layer output]``; may be overwritten.
        blocks: The blocks.
        probe: Compares each Jacobian.
        accumulator: Takes each Jacobian.

    Returns:
        ``[C, N, *layer input]``, unless no layer before the chain needs it.
    """
    chain: list[_Link] = []
    passed = Joined(s.shape[1])
    for block in blocks:
        part = s[:, block]
        for link in chain:
            part = link.pass_back(block, part)
        while block is blocks[0] and _any_wanted(uses) and sum(link.waiting for link in chain) <= WAITING:
            chain.append(_Link(uses.pop(), accumulator, passes_on=_any_wanted(uses), n=s.shape[1]))
            part = chain[-1].pass_back(block, part)
        if _any_wanted(uses):
            passed.put(block, _axes(part), part)
    while chain:
        jacobians = chain.pop(0).jacobians()
        probe.add(jacobians)
        accumulator.add(jacobians)
    return passed.ordered(_axes(passed.tensor)) if _any_wanted(uses) else s


def _axes(s: Tensor) -> str:
    """Name the axes of ``s``.

    Args:
        s: ``[C, N, ...]``.

    Returns:
        A letter for each.
    """
    return "cn" + string.ascii_uppercase[: s.ndim - 2]


class _Link:
    """A layer in a chain, through which blocks of samples pass."""

    def __init__(self, use: Use, accumulator: "Accumulator", *, passes_on: bool, n: int) -> None:
        """Set up.

        Args:
            use: The use of the layer.
            accumulator: Will take the layer's Jacobians.
            passes_on: Whether a layer before needs ``s``.
            n: The number of samples.
        """
        self._use, self._accumulator, self._passes_on, self._n = use, accumulator, passes_on, n
        self._s = Joined(n)
        self._joined: dict[str, tuple[str, list[Joined]]] = {}

    @property
    def waiting(self) -> int:
        """Numbers that wait for other blocks."""
        wholes = [self._s, *(whole for _, wholes in self._joined.values() for whole in wholes)]
        return sum(whole.numel for whole in wholes)

    def pass_back(self, block: slice, s: Tensor) -> Tensor:
        """Keep what the Jacobians need of a block, and pass ``s`` back.

        Args:
            block: Its samples.
            s: ``[C, block, *layer output]``; may be overwritten.

        Returns:
            ``[C, block, *layer input]``, or ``s`` if no layer before needs it.
        """
        use = self._use.restrict(block)
        if use.params:
            self._keep(block, s, _jacobians(use, s))
        return backpropagate(use, s) if self._passes_on else s

    def _keep(self, block: slice, s: Tensor, jacobians: dict[str, Factored]) -> None:
        """Keep the Jacobians of a block as far as the order of contraction forms them, else ``s``.

        Args:
            block: Its samples.
            s: ``[C, block, *layer output]``.
            jacobians: The Jacobians, by name.
        """
        split_up = {name: self._accumulator.parts(name, jacobian, self._n) for name, jacobian in jacobians.items()}
        if any(found is None for found in split_up.values()):
            self._s.put(block, _axes(s), s)
            return
        for name, found in split_up.items():
            assert found is not None
            new = (jacobians[name].result, [Joined(self._n) for _ in found])
            for part, whole in zip(found, self._joined.setdefault(name, new)[1], strict=True):
                contract_into(part, whole, block)

    def jacobians(self) -> dict[str, Factored]:
        """Put the blocks together.

        Returns:
            The Jacobians of all samples, by the name users know the parameter by.
        """
        if self._s.numel > 0:
            return _jacobians(self._use, self._s.ordered(_axes(self._s.tensor)))
        return {
            name: Factored(f"{','.join(w.letters for w in wholes)}->{result}", tuple(w.tensor for w in wholes))
            for name, (result, wholes) in self._joined.items()
        }


def _jacobians(use: Use, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer's wanted parameters.

    Args:
        use: The layer and its input.
        s: ``[C, N, *layer output]``.

    Returns:
        The Jacobians, by the name users know the parameter by.
    """
    rule = rule_for(use.module)
    assert rule is not None
    factored = rule(use.module, use.x, s)
    return {name: factored[key] for key, name in use.params.items()}


def identity(output: Tensor) -> Tensor:
    """Start ``s`` at the output.

    Args:
        output: ``[N, *out]``.

    Returns:
        The Jacobian of the flattened output with respect to the output, ``[C, N, *out]``: the same for all samples,
        and kept once.
    """
    n, *out = output.shape
    eye = torch.eye(output[0].numel(), dtype=output.dtype, device=output.device)
    return eye.reshape(-1, 1, *out).expand(-1, n, *out)


def backpropagate(use: Use, s: Tensor) -> Tensor:
    """Pass ``s`` back through a layer.

    Args:
        use: The layer and its input.
        s: ``[C, N, *layer output]``; may be overwritten.

    Returns:
        ``[C, N, *layer input]``; kept once where it is the same for all samples.
    """
    function, linear = backpropagation_for(use.module)
    if linear and s.stride(1) == 0:
        return function(use.module, use.x[:1], s[:, :1]).expand(-1, s.shape[1], *use.x.shape[1:])
    return function(use.module, use.x, s)


class Accumulator:
    """Sums kernels over the uses of parameters.

    A parameter that is used once is contracted at once. The Jacobian of one that is used several times is the
    sum over its uses, so its kernel is the sum over all pairs of uses, and they wait for the last of them.

    Attributes:
        kernels: The kernels so far, by name (empty for their sum).
    """

    def __init__(self, compute: str, n1: int | None, per_parameter: bool, counts: Counter[str] | None = None) -> None:
        """Set up.

        Args:
            compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
            n1: How many samples are x1; ``None`` where all are both x1 and x2.
            per_parameter: Whether to keep kernels of parameters apart.
            counts: How often each parameter is used; ``None`` for once.
        """
        self.compute, self.n1, self.per_parameter = compute, n1, per_parameter
        self._counts = Counter() if counts is None else counts
        self.kernels: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Factored]] = defaultdict(list)

    def is_reused(self, name: str) -> bool:
        """Tell whether Jacobians of a parameter wait for others.

        Args:
            name: The parameter.

        Returns:
            Whether it is used more than once.
        """
        return self._counts[name] > 1

    def parts(self, name: str, jacobian: Factored, n: int) -> list[Part] | None:
        """Group the operands of a Jacobian by what can be contracted for some samples by themselves.

        Args:
            name: The parameter.
            jacobian: The Jacobian of some samples.
            n: The number of all samples.

        Returns:
            The groups, or ``None`` where nothing can.
        """
        if self.is_reused(name):
            return None
        n1 = n if self.n1 is None else self.n1
        return parts(jacobian, n1, n1 if self.n1 is None else n - n1, self.compute)

    def add(self, jacobians: dict[str, Factored]) -> None:
        """Add one use of a layer.

        Args:
            jacobians: The Jacobian of each wanted parameter, by name.
        """
        products: list[tuple[str, Doubled]] = []
        for name, jacobian in jacobians.items():
            self._waiting[name].append(jacobian)
            if len(self._waiting[name]) < self._counts[name]:
                continue
            terms = self._waiting.pop(name)
            key = name if self.per_parameter else ""
            if key not in self.kernels:
                self.kernels[key] = self._zeros(jacobian)
            products += [(key, double(a, b, self.compute)) for a in terms for b in terms]
        if products:
            self._contract(products)

    def _contract(self, products: list[tuple[str, Doubled]]) -> None:
        """Contract products of Jacobians.

        Args:
            products: Which product to add to which kernel.
        """
        add_products(self.kernels, products, self.n1)

    def _zeros(self, jacobian: Factored) -> Tensor:
        """Allocate a kernel.

        Args:
            jacobian: A Jacobian.

        Returns:
            ``[N1, N2, C, C]``, ``[N1, N2, C]`` or ``[N1, N2]``.
        """
        c, n = (jacobian.sizes[letter] for letter in "cn")
        samples = (n, n) if self.n1 is None else (self.n1, n - self.n1)
        like = next(operand for operand in jacobian.operands if isinstance(operand, Tensor))
        return like.new_zeros(*samples, *[c] * {"full": 2, "diagonal": 1, "trace": 0}[self.compute])


class _Recorder(Accumulator):
    """Takes products of Jacobians down instead of contracting them.

    Attributes:
        products: Names of parameters and products.
    """

    def __init__(self, compute: str, n1: int | None, per_parameter: bool, counts: Counter[str]) -> None:
        """Set up.

        Args:
            compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
            n1: How many samples are x1; ``None`` where all are both x1 and x2.
            per_parameter: Whether to keep parameters apart.
            counts: How often each parameter is used.
        """
        super().__init__(compute, n1, per_parameter, counts)
        self.products: list[tuple[str, Doubled]] = []

    def _contract(self, products: list[tuple[str, Doubled]]) -> None:
        """Take products down.

        Args:
            products: Which product belongs to which parameter.
        """
        self.products += products


class _Probe:
    """Compares the Jacobians that rules write with autograd, on a few samples.

    For random numbers v, the norm of the rules' ``sum v[n, c] J[c, n]`` over these samples must be that of autograd's
    gradient of ``sum v[n, c] f[n, c]``, with f evaluated on these samples by themselves. So this also finds samples
    that influence one another. Norms suffice, since the kernel does not change when a Jacobian is rotated; they are
    computed like kernels, without a tensor of the parameter's size.
    """

    def __init__(self, request: Request, output: Tensor, seed: int) -> None:
        """Compute what autograd makes of it.

        Args:
            request: The request.
            output: The outputs ``[N, *out]`` of all samples.
            seed: Decides on the samples and on v.
        """
        generator = torch.Generator().manual_seed(seed)
        self.samples = torch.randperm(len(output), generator=generator, device="cpu")[:_PROBED].tolist()
        v = cotangent(output[self.samples], seed)
        found = gradients(request, request.x1.stack(request.x2)[self.samples], v)
        self.expected = {name: gradient.flatten().dot(gradient.flatten()) for name, gradient in found.items()}
        self.terms: dict[str, list[Factored]] = {name: [] for name in found}
        self.v = v.reshape(len(v), -1).T

    def add(self, jacobians: dict[str, Factored]) -> None:
        """Take down one use of a layer.

        Args:
            jacobians: The Jacobian of each wanted parameter, by name.
        """
        for name, jacobian in jacobians.items():
            self.terms[name].append(select_samples(jacobian, self.samples))

    def problems(self) -> Iterator[Problem]:
        """Judge.

        Yields:
            A problem for each parameter whose Jacobian differs.
        """
        total = sum(expected.item() for expected in self.expected.values())
        for name, expected in self.expected.items():
            error = gradient_error(squared_norm(self.terms[name], self.v), expected, total)
            if not error <= PROBE_TOLERANCES[self.v.dtype]:
                what = f"its Jacobian by the layer's rule differs from autograd's (relative error {error:.1e})"
                yield Problem(name, what, OTHER_METHOD)
