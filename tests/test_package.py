"""The package as a whole: what its import takes, and what holds for all of its modules."""

import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import pytest
from torch import Tensor

import ggn_ntk
from ggn_ntk.contraction.operand import OneHot


def run_in_a_new_process(code):
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_importing_takes_no_compiler_and_no_route_that_is_not_taken():
    run_in_a_new_process(
        "import sys, torch, ggn_ntk\n"
        "apart = {'torch._dynamo', 'matplotlib', 'scipy', 'backpack', 'vivit'}\n"
        "assert not apart & sys.modules.keys(), apart & sys.modules.keys()\n"
        "assert {'EmpiricalNTK', 'AccumulateGramHook'} <= set(dir(ggn_ntk))\n"
        "ggn_ntk.empirical_ntk(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.randn(2, 3), check=True)\n"
        "assert not {'backpack', 'vivit'} & sys.modules.keys()\n"
        "ggn_ntk.EmpiricalNTK(), ggn_ntk.AccumulateGramHook(), ggn_ntk.empirical_ntk_vivit\n"
        "assert {'backpack', 'vivit'} <= sys.modules.keys()"
    )


def test_kernels_take_no_compiler():
    """Its import takes seconds."""
    run_in_a_new_process(
        "import sys, torch, ggn_ntk\n"
        "class Twice(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * 2\n"
        "for layer in (torch.nn.Linear(3, 3), Twice(3, 3)):\n"
        "    kernel = ggn_ntk.empirical_ntk_fn(torch.nn.Sequential(layer, torch.nn.Tanh()))\n"
        "    for _ in range(4):\n"
        "        kernel(torch.randn(2, 3))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )


WITH_VIVIT = (
    "ggn_ntk.empirical_ntk(model, x, method='vivit')",
    "ggn_ntk.empirical_ntk_vivit",
    "ggn_ntk.AccumulateGramHook",
)


@pytest.mark.parametrize(
    ("renamed", "broken"),
    [("vivit.extensions.secondorder.vivit", WITH_VIVIT), ("backpack", (*WITH_VIVIT, "ggn_ntk.EmpiricalNTK"))],
    ids=["vivit", "backpack"],
)
def test_a_rename_in_backpack_or_vivit_breaks_what_needs_them_alone(renamed, broken):
    """A module in which nothing has the name that it had."""
    run_in_a_new_process(
        "import sys, types, warnings\n"
        f"sys.modules[{renamed!r}] = types.ModuleType({renamed!r})\n"
        "import torch, ggn_ntk\n"
        "warnings.simplefilter('error', ggn_ntk.RouteWarning)\n"
        "model, x = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()), torch.randn(2, 3)\n"
        "for method in ('auto', 'jacobian_contraction', 'ntk_vector_products'):\n"
        "    ggn_ntk.empirical_ntk(model, x, method=method, check=True)\n"
        f"for use in {broken}:\n"
        "    try:\n"
        "        eval(use)\n"
        "    except ImportError as error:\n"
        f"        assert {renamed!r} in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(use)\n"
        f"ggn_ntk.EmpiricalNTK if 'ggn_ntk.EmpiricalNTK' not in {broken} else None"
    )


MODULES = [m.name for m in pkgutil.walk_packages(ggn_ntk.__path__, "ggn_ntk.")]


def holds_tensors(annotation):
    inside = typing.get_args(annotation)
    return annotation in (Tensor, OneHot) or "Tensor" in str(annotation) or any(map(holds_tensors, inside))


@pytest.mark.parametrize("name", MODULES)
def test_dataclasses_that_hold_tensors_are_equal_to_themselves_alone(name):
    module = importlib.import_module(name)
    kinds = [kind for _, kind in inspect.getmembers(module, dataclasses.is_dataclass) if kind.__module__ == name]
    tensors = {kind for kind in kinds if any(holds_tensors(field.type) for field in dataclasses.fields(kind))}
    for _ in kinds:  # and those that hold these
        names = [kind.__name__ for kind in tensors]
        tensors |= {k for k in kinds if any(n in str(f.type) for n in names for f in dataclasses.fields(k))}
    for kind in tensors:
        assert kind.__eq__ is object.__eq__
        assert kind.__hash__ is object.__hash__
