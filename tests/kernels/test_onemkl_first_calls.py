"""Every function of torch's that oneMKL computes is called on one thread before threads share it.

Without that a first call may be wrong for a thread's share of the numbers
(kernels/cpu/onemkl_first_calls.py): in one process of ten, too rarely for a test of numbers. So the
tests look at the calls.
"""

import ast
import sys
from pathlib import Path

import pytest

from kernels.cpu import onemkl_first_calls
from tests.helpers import programs

ROOT = Path(__file__).resolve().parents[2]
# unary functions of float tensors that ATen/cpu/vml.h hands to oneMKL
ONEMKL = set(
    "acos asin atan cos cosh erf erfc erfinv exp expm1 lgamma log log10 log1p log2 rsqrt sin sinh "
    "sqrt tan tanh".split()
)
OTHERS = {"math", "np", "numpy", "tl", "libdevice"}  # their functions are not torch's


def called(source: str) -> set[str]:
    """The functions of ONEMKL that a file calls, as methods or of torch, in place or not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.rstrip("_") in ONEMKL:
            if not (isinstance(node.value, ast.Name) and node.value.id in OTHERS):
                found.add(node.attr.rstrip("_"))
    return found


@pytest.mark.parametrize("room", ["kernels", "model", "engine"])
def test_every_function_in_use_is_called_first(room):
    used = set().union(*(called(path.read_text()) for path in (ROOT / room).rglob("*.py")))
    assert used <= set(onemkl_first_calls.FUNCTIONS), (
        f"add {sorted(used - set(onemkl_first_calls.FUNCTIONS))} to "
        "kernels/cpu/onemkl_first_calls.py"
    )
    assert used or room == "engine", "the search finds nothing"


def test_the_search_finds_methods_functions_and_in_place_forms():
    source = "x.exp_()\ntorch.log(x)\ntl.exp2(y)\nmath.sqrt(2)\ny = x.tan"
    assert called(source) == {"exp", "log", "tan"}


@pytest.mark.parametrize(
    "module", ["kernels.rms_norm", "kernels.adamw", "model.rope", "engine.train.train"]
)
def test_importing_a_module_that_computes_makes_the_first_calls(module):
    """In a process of its own: the functions called while it is imported."""
    script = f"""
import importlib, torch
from torch.utils._python_dispatch import TorchDispatchMode
calls = []
class Record(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {onemkl_first_calls.FUNCTIONS!r}:
            calls.append((name, args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {{}}))
with Record():
    importlib.import_module({module!r})
print(sorted({{(name, str(dtype)) for name, dtype, n in calls if n < 2048}}))
"""
    done = programs.run([sys.executable, "-c", script], kind="torch", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wanted = {
        (f, dtype)
        for f in onemkl_first_calls.FUNCTIONS
        for dtype in ("torch.float32", "torch.float64")
    }
    assert set(ast.literal_eval(done.stdout)) == wanted
