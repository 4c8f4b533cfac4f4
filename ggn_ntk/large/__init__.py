"""Kernels larger than memory, in tiles on disk; public here is what calls return and raise."""

from ggn_ntk.large.executors import StripError
from ggn_ntk.large.plan import Cost, Form, Plan, Tile
from ggn_ntk.large.store import StoreError

__all__ = ["Cost", "Form", "Plan", "StoreError", "StripError", "Tile"]
