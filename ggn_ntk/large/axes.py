"""Which axes of a kernel are outputs of x1, and which of x2."""

from collections.abc import Mapping

from torch import Size

from ggn_ntk.large.plan import Form, Path
from ggn_ntk.problem.output_axes import AxesRequest


def output_axes(keys: Path, forms: Mapping[Path, Form], request: AxesRequest) -> tuple[list[int], list[int]]:
    """Find the axes of a kernel ``[N1, N2, ...]`` that are outputs of x1, and of x2; diagonal ones are of both."""
    behind = len(forms[keys].outputs)
    if request.compute != "full":
        both = list(range(2, 2 + behind))
        return both, both
    # Of a pair of outputs, each has as many axes as in the kernel with itself.
    alike = [(*keys[:-1], (key, key)) for key in keys[-1]] if is_pair(keys) else [keys, keys]
    summed = 2 * len(request.trace_axes) + len(request.diagonal_axes)
    counts = [(len(forms.get(same, forms[keys]).outputs) + summed) // 2 for same in alike]
    first, second = (request.resolve(Size([1] * count)).first for count in counts)
    if len(first.kept) + len(second.free) != behind:
        raise ValueError(
            f"Of a kernel's {behind} axes behind those of samples, it is not known which are outputs of x1, and which "
            "of x2: compute it with outputs of as many axes (output=)."
        )
    of_first = {axis: 2 + place for place, axis in enumerate(first.kept)}
    of_second = {axis: 2 + len(of_first) + place for place, axis in enumerate(second.free)}
    of_second |= {axis: of_first[same] for axis, same in zip(second.diagonal, first.diagonal, strict=True)}
    return list(of_first.values()), [of_second[axis] for axis in second.kept]


def is_pair(keys: Path) -> bool:
    """Tell whether a kernel is one of a pair of outputs, by its keys."""
    return bool(keys) and isinstance(keys[-1], tuple)
