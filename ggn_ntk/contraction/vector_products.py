"""Products of Jacobians with vectors: what a probe compares with autograd, without forming the Jacobians."""

import math
import string
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, OneHot

# Gradients of large parameters are compared by their products with a few random vectors. How many vectors, and how many
# entries are many for a parameter.
_VECTORS, _LARGE = 8, 2**16

# Numbers that an operand may hold before samples are taken a few at a time: products copy windows.
_COPIED = 2**24


def sketched(gradient: Tensor, param: Tensor) -> Tensor:
    """Multiply the rows of a large gradient with random vectors."""
    # A difference of two gradients is as large, relative to them, after as before, but for a factor that is far from
    # one only with a small probability.
    vectors = _vectors(param)
    if vectors is None:
        return gradient.flatten()
    return (vectors.to(gradient) @ gradient.reshape(-1, vectors.shape[1]).T).flatten()  # faster than its transpose


def norm_of_sketch(products: Tensor, param: Tensor) -> Tensor:
    """Estimate the norm of a gradient from what :func:`sketched` has made of it."""
    norm: Tensor = torch.linalg.vector_norm(products)
    return norm if _vectors(param) is None else norm / math.sqrt(_VECTORS)


def _vectors(param: Tensor) -> Tensor | None:
    """Draw the vectors that rows of a gradient are multiplied by, always the same ones."""
    # param [R, ...] -> [V, entries of a row]
    row = param.numel() // max(1, len(param)) if param.ndim > 1 else 0
    return None if param.numel() < _LARGE or row <= _VECTORS else _random_vectors(row, param.dtype, param.device)


@lru_cache(maxsize=64)
def _random_vectors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw vectors."""
    # -> [V, size]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randn(_VECTORS, size, generator=generator, dtype=torch.float64).to(device, dtype)


def weighted_sum(jacobian: Factored, weights: Tensor, param: Tensor) -> Tensor:
    """Compute ``sum_cn v[c, n] J[c, n]``, :func:`sketched`."""
    # weights [C, N] -> [P]
    n, largest = weights.shape[1], max(math.prod(operand.shape) for operand in jacobian.operands)
    count = min(n, -(-largest // _COPIED))
    if count > 1:
        blocks = [range(n * i // count, n * (i + 1) // count) for i in range(count)]
        parts = [
            weighted_sum(select_samples(jacobian, block), weights[:, block.start : block.stop], param)
            for block in blocks
        ]
        return torch.stack(parts).sum(0)
    vectors = _vectors(param)
    shorter = None if vectors is None else _multiply_rows(jacobian, vectors)
    if shorter is None:
        return sketched(_weighted_sum(jacobian, weights), param)
    return _weighted_sum(shorter, weights)


def _multiply_rows(jacobian: Factored, vectors: Tensor) -> Factored | None:
    """Multiply the rows of a parameter's Jacobian with vectors, where this is for one operand alone to do."""
    # vectors [V, entries of a row]
    row, sizes = jacobian.result, jacobian.sizes
    while row and math.prod(sizes[letter] for letter in row[1:]) >= vectors.shape[1]:
        row = row[1:]
    terms, operands = jacobian.terms, list(jacobian.operands)
    places = [i for i, term in enumerate(terms) if set(term) & set(row)]
    if len(places) != 1 or math.prod(sizes[letter] for letter in row) != vectors.shape[1]:
        return None
    (place,) = places
    term, operand = terms[place], operands[place]
    if "c" in term or not set(row) <= set(term) or not isinstance(operand, Tensor):
        return None
    new = next(letter for letter in string.ascii_letters if letter not in jacobian.equation)
    terms[place] = new + "".join(letter for letter in term if letter not in row)
    shaped = vectors.to(operand.dtype).reshape(-1, *(sizes[letter] for letter in row))
    operands[place] = torch.einsum(f"{term},{new}{row}->{terms[place]}", operand, shaped)
    return Factored(f"{','.join(terms)}->cn{new}{jacobian.result[2 : -len(row)]}", tuple(operands))


def _weighted_sum(jacobian: Factored, weights: Tensor) -> Tensor:
    """Compute ``sum_cn v[c, n] J[c, n]``."""
    # weights [C, N] -> [P]
    weights = weights.to(next(o.dtype for o in jacobian.operands if isinstance(o, Tensor)))
    result, operands = jacobian.result[2:], list(zip(jacobian.terms, jacobian.operands, strict=True))
    one_hot = [(term, operand) for term, operand in operands if isinstance(operand, OneHot)]
    dense = [(term, operand) for term, operand in operands if isinstance(operand, Tensor)]
    if sum("c" in term for term, _ in dense) == 1:  # the weights first: what is left has no outputs
        term, s = dense.pop(next(i for i, (term, _) in enumerate(dense) if "c" in term))
        n = "n" if any("n" in other for other, _ in (*dense, *one_hot)) else ""
        summed = "".join(letter for letter in term if letter not in "cn") + n
        dense.insert(0, (summed, torch.einsum(f"{term},cn->{summed}", s, weights)))
    else:
        dense.append(("cn", weights))
    terms, tensors = zip(*dense, strict=True)
    if not one_hot:
        return torch.einsum(f"{','.join(terms)}->{result}", *tensors).flatten()
    ((term, vectors),) = one_hot
    places, rest = term[:-1], result.replace(term[-1], "")
    letters = places + "".join(letter for letter in rest if letter not in places)
    return _scatter(torch.einsum(f"{','.join(terms)}->{letters}", *tensors), letters, term, vectors, result)


def _scatter(values: Tensor, letters: str, term: str, vectors: OneHot, result: str) -> Tensor:
    """Multiply by one-hot vectors, and sum over their places."""
    sizes = dict(zip(letters, values.shape, strict=True)) | {term[-1]: vectors.size}
    known = vectors.places.reshape(*vectors.places.shape, *[1] * (values.ndim - vectors.places.ndim))
    index = torch.zeros_like(values, dtype=torch.long)
    for letter in result:
        along = known.clamp(min=0)
        if letter in letters:
            along = torch.arange(sizes[letter], device=index.device)
            along = along.view([-1 if other == letter else 1 for other in letters])
        index = index * sizes[letter] + along
    flat = values.new_zeros(math.prod(sizes[letter] for letter in result))
    return flat.index_add_(0, index.flatten(), (values * (known >= 0)).flatten())


def pick(jacobian: Factored, outputs: Tensor, samples: Tensor) -> Factored:
    """Take one output of each of some samples."""
    # outputs [M], samples [M]
    terms, operands = [], list[Tensor | OneHot]()
    for term, operand in zip(jacobian.terms, jacobian.operands, strict=True):
        if isinstance(operand, OneHot):
            n = term.find("n")
            operand = operand if n < 0 else operand._replace(places=operand.places.index_select(n, samples))
        elif "c" in term:
            rest = "".join(letter for letter in term if letter not in "cn")
            lead = [letter for letter in "cn" if letter in term]
            tensor = operand.permute([term.index(letter) for letter in (*lead, *rest)])
            operand = tensor[outputs, samples] if "n" in term else tensor[outputs]
            term, operand = f"cn{rest}", operand.unsqueeze(0)
        elif "n" in term:
            operand = operand.index_select(term.index("n"), samples)
        terms.append(term)
        operands.append(operand)
    return Factored(f"{','.join(terms)}->{jacobian.result}", tuple(operands))


def squared_terms(jacobian: Factored) -> Tensor:
    """Sum the squared norms of the terms that a Jacobian adds up, one for each position."""
    squares = [
        (operand.places >= 0).double() if isinstance(operand, OneHot) else operand.square()
        for operand in jacobian.operands
    ]
    dtype = min((t.dtype for t in squares), key=lambda dtype: torch.finfo(dtype).bits)
    terms = [t[:-1] if isinstance(o, OneHot) else t for t, o in zip(jacobian.terms, jacobian.operands, strict=True)]
    return torch.einsum(f"{','.join(terms)}->", *(t.to(dtype) for t in squares))


def select_samples(jacobian: Factored, samples: Sequence[int]) -> Factored:
    """Restrict a Jacobian to some samples: to views, or copies of these alone, in whatever layout operands are."""
    operands = []
    for term, operand in zip(jacobian.terms, jacobian.operands, strict=True):
        n, tensor = term.find("n"), operand.places if isinstance(operand, OneHot) else operand
        if n >= 0:
            if isinstance(samples, range):
                tensor = tensor.narrow(n, samples.start, len(samples))
            else:
                views = [tensor.narrow(n, sample, 1) for sample in samples]
                tensor = torch.cat(views, n) if len(views) > 1 else views[0]
        operands.append(operand._replace(places=tensor) if isinstance(operand, OneHot) else tensor)
    return Factored(jacobian.equation, tuple(operands))
