"""The oracle: kernels from Jacobians of ``torch.func``, and from products with vectors."""

from ggn_ntk.methods.reference import jacobian_contraction, ntk_vector_products
from ggn_ntk.models.comparison import relative_error

__all__ = ["jacobian_contraction", "ntk_vector_products", "relative_error"]
