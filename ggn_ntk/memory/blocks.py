"""Samples a few at a time.

What passes between convolutions, ``s`` ``[C, N, ...]``, is far larger than a processor's cache, and every layer would
read and write all of it. A block of samples that fits stays there from layer to layer. What has to wait for the other
blocks are the Jacobians of the layers' parameters, where the cheapest order of contraction forms them (or whatever it
makes of them before x1 meets x2), and ``s`` itself where it does not.
"""

from itertools import pairwise
from math import ceil


def split(n: int, block: int) -> list[slice]:
    """Split samples evenly."""
    count = ceil(n / max(1, min(n, block)))
    edges = [i * n // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
