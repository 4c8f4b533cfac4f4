"""Every route against the float64 oracle, over all cases."""

import torch
from cases import CASES
from conftest import COMPUTES, METHODS, assert_close, oracle, oracle_sum, places
from covering import covers

from ggn_ntk import empirical_ntk


def of_two_sets(model, x1, x2, case, device, **options):
    kernel = empirical_ntk(model, x1, x2, **options)
    assert_close(kernel, oracle_sum(case, compute=options["compute"], device=device))


def of_one_set(model, x1, x2, case, device, **options):
    kernel = empirical_ntk(model, x1, **options)
    assert_close(kernel, oracle_sum(case, symmetric=True, compute=options["compute"], device=device))
    transposed = kernel.transpose(0, 1)
    if options["compute"] == "full" and kernel.ndim > 2:
        k = (kernel.ndim - 2) // 2
        transposed = transposed.permute(0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
    assert torch.equal(kernel, transposed)


def of_each_parameter(model, x1, x2, case, device, **options):
    kernels = empirical_ntk(model, x1, x2, per_parameter=True, **options)
    expected = oracle(case.name, compute=options["compute"], device=device)
    assert list(kernels) == list(expected)
    for name, kernel in kernels.items():
        assert_close(kernel, expected[name], scale=oracle_sum(case, compute=options["compute"], device=device))


KERNELS = [of_two_sets, of_one_set, of_each_parameter]

# What a route does not support is refused: see test_vivit and test_structured.
ROUTES = [(c, m) for c in CASES for m in METHODS if c.supports(m)]


# With each case, the structured route, which knows layers, meets every pair of a kernel, what is computed of it, and
# where; the other routes meet every one of these.
STRUCTURED = [(*route, kernel) for route in ROUTES if route[1] == "structured" for kernel in KERNELS]
OTHERS = [route for route in ROUTES if route[1] != "structured"]


@covers(
    {"case, method, kernel": STRUCTURED, "compute": COMPUTES, "dtype, device": places},
    {"case, method": OTHERS, "kernel": KERNELS, "compute": COMPUTES, "dtype, device": places},
)
def test_kernel(case, method, kernel, compute, dtype, device):
    kernel(*case.build(dtype, device), case, device, method=method, compute=compute)
