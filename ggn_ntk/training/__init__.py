"""What training does, read off kernels: gradient flow and descent, kernel regression, ensembles and posteriors.

Notation: N training samples, outputs ``[*out]`` of C numbers, the kernel Θ of the training set, functions f of shape
``[N, *out]``, targets y. A kernel is

- full, ``[N1, N2, *out, *out]``: what :func:`ggn_ntk.empirical_ntk` computes. It describes the linearized network.
- one for all outputs, ``[N1, N2]``: each output evolves by it, and none influences another, as if the full kernel were
  ``K[n, m] δ[c, d]``. It is used as it is given. ``compute="trace"`` sums over outputs, so pass it divided by C to put
  their mean in place of each.
- one for each output, ``[N1, N2, *out]``, as ``compute="diagonal"``: each output evolves by its own.
- any other, ``[N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``, with the keywords
  ``trace_axes`` and ``diagonal_axes`` that it was computed with. Outputs along a traced axis share a kernel, and none
  influences another, as with ``trace_axes`` in neural-tangents' ``predict``; a traced kernel is a sum here and their
  mean there, so divide it by the number of outputs along traced axes. Outputs along a diagonal axis evolve by their
  own.

The squared loss is ½ mean (f - y)² over all N C entries, as in neural-tangents. Under gradient flow dθ/dt = -η dL/dθ
with learning rate η, the outputs of the linearized network follow

    df/dt = -η / (N C) Θ (f - y)

(Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear
Models Under Gradient Descent", NeurIPS 2019, section 2.2), so a step of gradient descent takes a time of about one.

``diag_reg`` adds that multiple of the mean diagonal to the diagonal of the training kernel. For the dynamics, it is as
if each output of each training sample had a parameter of its own that no test sample sees.

Everything is computed in float64 on the kernel's device. Results have the wider of the dtypes of kernel and targets,
and no graph.
"""

from ggn_ntk.spectrum.decompositions import IllConditionedWarning
from ggn_ntk.training.any_loss import gradient_descent, gradient_flow
from ggn_ntk.training.arguments import Gaussian
from ggn_ntk.training.regression import kernel_ridge_regression, nngp_posterior, ntk_ensemble
from ggn_ntk.training.squared_loss import gradient_descent_mse, gradient_flow_mse, max_learning_rate

__all__ = [
    "Gaussian",
    "IllConditionedWarning",
    "gradient_descent",
    "gradient_descent_mse",
    "gradient_flow",
    "gradient_flow_mse",
    "kernel_ridge_regression",
    "max_learning_rate",
    "nngp_posterior",
    "ntk_ensemble",
]
