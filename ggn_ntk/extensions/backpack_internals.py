"""The only reader of BackPACK's and ViViT's private parts, and of BackPACK's state of the process.

Each is named here by what it is for, so that a release that drops one shows in this file, and first in
``tests/process/test_internals.py``. BackPACK's hook that stores inputs and outputs is looked up in
``models/isolation.py``, which must not import BackPACK.
"""

from collections.abc import Iterable
from typing import Any

from backpack.context import CTX
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from torch.nn import Module

#: The flag that ``extend`` leaves on a module.
EXTENDED = "_backpack_extend"


def module_extensions(extension: BackpropExtension) -> dict[type[Module], Any]:
    """Look up the extensions that an extension has for types of modules."""
    extensions: dict[type[Module], Any] = extension._BackpropExtension__module_extensions
    return extensions


def params_of(module_extension: Any) -> list[str]:
    """Name the parameters for which a module extension has a quantity."""
    names: list[str] = module_extension._ModuleExtension__params
    return names


def quantities_of(saved: SavedQuantities) -> dict[int, Any]:
    """Look up what is kept for modules that a backward pass has not reached, by the address of their outputs."""
    quantities: dict[int, Any] = saved._saved_quantities
    return quantities


def active_extensions() -> tuple[BackpropExtension, ...]:
    """List the extensions of the ``backpack`` context around a backward pass."""
    extensions: tuple[BackpropExtension, ...] = CTX.get_active_exts()
    return extensions


def set_active_extensions(extensions: Iterable[BackpropExtension]) -> None:
    """Set the extensions that BackPACK calls at the next modules."""
    CTX.set_active_exts(extensions)


def hook_handles() -> list[Any]:
    """Look up the list of the hooks that ``extend`` has registered in this process."""
    handles: list[Any] = CTX.hook_handles
    return handles
