"""Who takes part, and in what."""

from benchmarks.workloads import Sweep, Workload

GGN_NTK = "ggn_ntk"
PREPARED = "empirical_ntk_fn"
BEFORE = "ggn_ntk before"
PREPARED_BEFORE = "empirical_ntk_fn before"
CLONE = "ggn_ntk, x2=x1.clone()"
REDUCED = "ggn_ntk, full kernel reduced"
AUTOGRAD = "ggn_ntk, capture='autograd'"
BOUNDED = "ggn_ntk, memory='2GB'"
BY_HAND = "by hand, unchecked"
JACOBIANS = "Jacobian contraction"
GRADIENTS = "vmap(grad), output by output"
PRODUCTS = "NTK-vector products"
VIVIT = "ViViT"
NNGEOMETRY = "nngeometry"
ASDFGHJKL = "asdfghjkl"
NEURAL_TANGENTS = "neural-tangents"

#: No contender: measures the rate of arithmetic, for the floor.
MATRIX_PRODUCT = "matrix product"

#: Variants of a training step, for the overhead.
STEP = "forward and backward"
BATCH_GRAD_STEP = "with BatchGrad"
KERNEL_STEP = "with BatchGrad and EmpiricalNTK"
ALONE = "empirical_ntk by itself"

#: This library beside itself at another commit.
AGAINST = [GGN_NTK, BEFORE, PREPARED, PREPARED_BEFORE]


def contenders_of(workload: Workload) -> list[str]:
    """Choose who runs a workload.

    Args:
        workload: The workload, not one of a sweep.

    Returns:
        The contenders.
    """
    if workload.name == "small":
        return [GGN_NTK, PREPARED, BY_HAND, VIVIT, NEURAL_TANGENTS]
    if workload.paired:
        return [GGN_NTK, PREPARED, JACOBIANS, NEURAL_TANGENTS]
    if workload.architecture and workload.compute == "trace":
        return [GGN_NTK, PREPARED, GRADIENTS]
    if workload.architecture:
        return [GGN_NTK, PREPARED, *[CLONE] * workload.symmetric, JACOBIANS]
    if workload.trace_axes:
        return [GGN_NTK, REDUCED, JACOBIANS]
    if workload.symmetric:
        return [GGN_NTK, CLONE, JACOBIANS, NEURAL_TANGENTS]
    if workload.compute == "trace":
        return [GGN_NTK, PREPARED, JACOBIANS, NEURAL_TANGENTS]
    captured = [AUTOGRAD] if workload.name in ("cnn", "vgg") else []
    return [GGN_NTK, PREPARED, *captured, JACOBIANS, PRODUCTS, VIVIT, NNGEOMETRY, ASDFGHJKL, NEURAL_TANGENTS]


def swept(sweep: Sweep) -> list[str]:
    """Choose who runs the workloads of a sweep.

    Args:
        sweep: The sweep.

    Returns:
        The contenders.
    """
    workload = next(iter(sweep.workloads.values()))
    if workload.architecture:
        return [GGN_NTK, BOUNDED]
    if workload.compute == "trace":
        return [GGN_NTK, PREPARED, JACOBIANS, NEURAL_TANGENTS]
    return [GGN_NTK, PREPARED, JACOBIANS, PRODUCTS, VIVIT, NEURAL_TANGENTS]


def available(contenders: list[str], device: str) -> list[str]:
    """Leave out who cannot compute on a device.

    Args:
        contenders: The contenders.
        device: The device.

    Returns:
        Those who can.
    """
    return [name for name in contenders if device == "cpu" or name != NEURAL_TANGENTS]
