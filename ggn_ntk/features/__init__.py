"""Projected features: Jacobians times a random projection, whose inner products estimate the kernel without bias.

Nothing here is exact but in the mean over seeds. How far an entry of the kernel is off, its standard error estimates.
"""

from ggn_ntk.features.projected import ProjectedFeatures, projected_features
from ggn_ntk.features.projection import Projection

__all__ = ["ProjectedFeatures", "Projection", "projected_features"]
