"""Kernels larger than memory, in tiles on disk; public here is what calls return and raise."""

from ggn_ntk.large.executors import StripError
from ggn_ntk.large.plan import Form, Plan, Tile
from ggn_ntk.large.store import StoreError

__all__ = ["Form", "Plan", "StoreError", "StripError", "Tile"]
