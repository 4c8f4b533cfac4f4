"""Every route against the float64 oracle, over all cases."""

import torch
from cases import CASES
from conftest import COMPUTES, METHODS, PLACES, assert_close, oracle, oracle_sum
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


def refused_by_the_pretend_device(case, method):
    """Whether vmap raises there inside of the backward pass, or the case has a fused recurrent layer."""
    by_vmap = method in ("jacobian_contraction", "ntk_vector_products")
    return case.name == "recurrent" or (by_vmap and "prelu" in case.name.lower())


def tables(routes, places):
    """With each case, the structured route, which knows layers, meets every pair of the factors; others each value."""
    factors = {"compute": COMPUTES, "dtype, device": places}
    yield {"case, method, kernel": [(*r, k) for r in routes if r[1] == "structured" for k in KERNELS], **factors}
    yield {"case, method": [r for r in routes if r[1] != "structured"], "kernel": KERNELS, **factors}


@covers(
    *tables([r for r in ROUTES if not refused_by_the_pretend_device(*r)], PLACES),
    *tables([r for r in ROUTES if refused_by_the_pretend_device(*r)], [p for p in PLACES if p[1] != "pretend"]),
)
def test_kernel(case, method, kernel, compute, dtype, device):
    kernel(*case.build(dtype, device), case, device, method=method, compute=compute)
