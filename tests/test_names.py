"""What is public by name: here or in a public module; old names warn, and no module is hidden."""

import importlib
import inspect
import pkgutil
import sys
import warnings

import pytest

import ggn_ntk

MODULES = [value for name in ggn_ntk.__all__ if inspect.ismodule(value := getattr(ggn_ntk, name))]
MOVED = {
    "ggn_ntk.spectrum": [
        "centered_kernel_alignment",
        "condition_number",
        "effective_rank",
        "eigenvalues",
        "ggn_eigenvalues",
        "kernel_target_alignment",
        "relative_kernel_change",
    ],
    "ggn_ntk.training": [
        "Gaussian",
        "IllConditionedWarning",
        "gradient_descent_mse",
        "gradient_flow",
        "gradient_flow_mse",
        "kernel_ridge_regression",
        "max_learning_rate",
        "nngp_posterior",
        "ntk_ensemble",
    ],
}


@pytest.mark.parametrize(("home", "name"), [(home, name) for home, names in MOVED.items() for name in names])
def test_old_name_works_and_warns_where_it_is_used(home, name):
    with pytest.warns(DeprecationWarning, match=rf"ggn_ntk\.{name} has moved: import it from {home}") as by_attribute:
        found = getattr(ggn_ntk, name)
    with pytest.warns(DeprecationWarning, match="has moved") as by_import:
        exec(compile(f"from ggn_ntk import {name}", __file__, "exec"), {})
    assert found is getattr(importlib.import_module(home), name)
    assert {warning.filename for warning in (*by_attribute, *by_import)} == {__file__}
    assert name not in {*ggn_ntk.__all__, *dir(ggn_ntk)}


def test_names_that_do_not_exist():
    with pytest.raises(AttributeError, match="module 'ggn_ntk' has no attribute 'gradient_flaw'"):
        ggn_ntk.gradient_flaw  # noqa: B018


@pytest.mark.parametrize("module", [ggn_ntk, *MODULES], ids=lambda module: module.__name__)
def test_public_names_exist_and_are_listed(module):
    assert {*module.__all__} <= {*dir(module)}
    with warnings.catch_warnings(action="error"):
        assert all(getattr(module, name) is not None for name in module.__all__)


def test_dir_is_what_is_public():
    assert {name for name in dir(ggn_ntk) if not name.startswith("_")} == {*ggn_ntk.__all__}
    assert {"training", "spectrum", "reference", "plots", "rules"} <= {module.__name__[8:] for module in MODULES}


def test_no_module_is_hidden_by_another_name():
    for info in pkgutil.walk_packages(ggn_ntk.__path__, "ggn_ntk."):
        if info.name != "ggn_ntk.__main__":
            importlib.import_module(info.name)
            package, _, name = info.name.rpartition(".")
            assert getattr(sys.modules[package], name) is sys.modules[info.name], info.name
