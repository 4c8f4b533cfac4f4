"""Uses of one parameter, put together: the same Jacobian, from fewer einsums."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ggn_ntk import Factored
from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.contraction.uses import put_together

C, N, OUT, IN = 2, 3, 4, 5


def dense(use):
    operands = [
        torch.nn.functional.one_hot(o.places.clamp(min=0), o.size).double() * (o.places >= 0)[..., None]
        if isinstance(o, OneHot)
        else o
        for o in use.operands
    ]
    return torch.einsum(use.equation, *operands).reshape(C, N, -1)


def total(uses):
    return sum(dense(use) for use in uses)


def normal(*shape):
    return torch.randn(*shape).double()


def linear(positions):
    shape = (positions,) if positions else ()
    p = "p" * bool(positions)
    return Factored(f"cn{p}o,n{p}i->cnoi", (normal(C, N, *shape, OUT), normal(N, *shape, IN)))


def image(height, width):
    return Factored("cnohw,nihw->cnoi", (normal(C, N, OUT, height, width), normal(N, IN, height, width)))


def lookup(positions):
    places = torch.randint(-1, IN, (N, positions))
    return Factored("cnpo,npi->cnoi", (normal(C, N, positions, OUT), OneHot(places, IN)))


def formed():
    return Factored("cnoi->cnoi", (normal(C, N, OUT, IN),))


def shared(positions):
    """The same input for all samples, held once."""
    return Factored("cnpo,npi->cnoi", (normal(C, N, positions, OUT), normal(1, positions, IN).expand(N, -1, -1)))


def per_sample(positions):
    return Factored("cnpo,npi,n->cnoi", (normal(C, N, positions, OUT), normal(N, positions, IN), normal(N)))


def scaled(positions):
    """A linear layer in NTK parametrization."""
    return Factored("cnpo,npi,->cnoi", (*linear(positions).operands, torch.tensor(0.3).double()))


KINDS = [scaled, lambda n: linear(0), linear, lambda n: image(n, 2), lookup, lambda n: formed(), shared, per_sample]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4)), min_size=1, max_size=8))
def test_the_sum_stays(chosen):
    uses = [kind(size) for kind, size in chosen]
    together = put_together(uses)
    assert len(together) <= len(uses)
    assert_close(total(together), total(uses))


@pytest.mark.parametrize("kind", [linear, scaled, lambda n: image(n, 2), lookup, lambda n: formed(), shared])
def test_uses_of_one_form_become_one(kind):
    assert len(put_together([kind(n) for n in (1, 2, 3, 4, 5)])) == 1


def test_a_linear_layer_is_called_on_vectors_and_on_sequences():
    uses = [linear(0), linear(3), linear(1)]
    assert len(put_together(uses)) == 1
    assert_close(total(put_together(uses)), total(uses))


def test_axes_that_are_split_in_different_ways_are_added_up():
    uses = [formed(), Factored("cnk->cnk", (normal(C, N, OUT * IN),))]
    (together,) = put_together(uses)
    assert_close(together.formed(), total(uses))


def test_what_all_samples_share_is_not_copied():
    (together,) = put_together([shared(2), shared(3)])
    assert together.operands[1].stride(together.terms[1].index("n")) == 0
