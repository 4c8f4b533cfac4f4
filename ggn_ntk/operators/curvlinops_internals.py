"""The only reader of curvlinops' private parts: the class of all its operators."""

import warnings

try:
    with warnings.catch_warnings():  # linear_operator, which it imports, uses what torch deprecates
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        from curvlinops._torch_base import PyTorchLinearOperator
        from curvlinops.examples import IdentityLinearOperator
except ModuleNotFoundError as error:
    what = "ggn_ntk.operators needs curvlinops-for-pytorch, version 3 or later: pip install ggn-ntk[operators]"
    raise ModuleNotFoundError(f"{what} ({error}).", name=error.name, path=error.path) from error

__all__ = ["IdentityLinearOperator", "PyTorchLinearOperator"]
