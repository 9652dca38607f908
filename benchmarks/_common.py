"""Shared by the benchmarks of kernels: which kernels there are, and which operation launches them.

No list of launches is kept by hand: operations run on tensors without memory, inside
`kernels.launch.triton_launch.recording_launches`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import benchmarks.with_triton  # noqa: F401 before kernels
import kernels
from kernels import registry
from kernels.dtypes import accumulate_dtype
from kernels.launch import triton_launch
from kernels.launch.compile_ahead import Launch, recording, without_memory
from kernels.registry import Ops, functions
from kernels.spec import Spec, cast
from model.durable import directory_beside

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _fake_inputs(spec: Spec, shape: tuple[int, ...]) -> dict[str, Any]:
    return spec.make_inputs(shape, torch.Generator().manual_seed(0))


def record(
    spec: Spec,
    ops: Ops,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device_class: str,
    masters: bool = False,
) -> list[Launch]:
    """The launches of an operation at a shape of any size: its tensors have no memory.

    `masters`: on inputs as training has them (`typed`), not all of them in one dtype.
    """
    with recording(device_class) as launches, without_memory():
        inputs = _fake_inputs(spec, shape)
        spec.run(ops, typed(spec, inputs, dtype) if masters else cast(inputs, dtype))
    return launches


def typed(
    spec: Spec, inputs: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """A copy of a spec's inputs in training's dtypes: optimizer state and gradients in fp32."""
    master = accumulate_dtype(dtype)
    inputs = cast(inputs, master if spec.name == "adamw" else dtype, device)
    if spec.name in ("rope", "norm_rope"):
        inputs["cos_sin"] = inputs["cos_sin"].to(master)
    if spec.name == "lora_linear":
        group = inputs["group"]
        db = tuple(cast(list(group.db), master, device))
        inputs["group"] = dataclasses.replace(group, da=group.da.to(master), db=db)
    return inputs


def tables(spec: Spec) -> list[Ops]:
    """TRITON, and those of its variants that have this operation in another form."""
    usual = functions(registry.TRITON, spec)
    others = [ops for ops in registry.VARIANTS.values() if functions(ops, spec) != usual]
    return [registry.TRITON, *others]


def jitted() -> dict[str, Any]:
    """Every `@jit` function of the package, by name: kernels end in `_kernel`, others are helpers.

    >>> sorted(name for name in jitted() if name.endswith("_kernel"))
    """
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            fn = getattr(value, "fn", None)
            if hasattr(value, "arg_names") and getattr(fn, "__module__", None) == module.name:
                assert found.setdefault(name, value) is value, f"two @jit functions named {name}"
    return found


def specs_of(pattern: str) -> list[Spec]:
    """The specs that can launch a kernel whose name contains `pattern`; all of them for ""."""
    modules = {f.fn.__module__ for name, f in jitted().items() if pattern in name}

    def launches(spec: Spec) -> bool:
        # An operation's kernels are in its own file, or in files of its folder.
        own = spec.make_inputs.__module__
        return any(module.startswith(own) for module in modules)

    return [s for s in registry.SPECS.values() if pattern in s.name or launches(s)]


def other_triton(triton: str) -> Path:
    """The folder holding `triton/`: `triton` itself, or .triton/<version>, fetched by pip once."""
    if Path(triton, "triton").is_dir():
        return Path(triton).resolve()
    if not re.fullmatch(r"\d+(\.\d+)+", triton):
        sys.exit(f"--triton {triton}: neither a version nor a folder with triton/ in it")
    folder = ROOT / ".triton" / triton
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / ".gitignore").write_text("*\n")
        with directory_beside(folder) as beside:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            subprocess.check_call([*pip, "--target", str(beside), f"triton=={triton}"])
    return folder


def settle(module: str, triton: str | None) -> None:
    """Restart `python -m module`, if need be, without the interpreter and with this triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    restart = triton_launch.INTERPRETED
    if triton is not None:
        folder = other_triton(triton)
        here = triton_launch.triton is not None and Path(triton_launch.triton.__file__)
        restart |= not (here and here.is_relative_to(folder))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), env.get("PYTHONPATH"))))
    if restart:
        if "SDFT_RESTARTED" in env:
            sys.exit(f"triton {triton} cannot be imported here")
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, env | {"SDFT_RESTARTED": "1"})
    if triton_launch.triton is None:
        sys.exit("triton is not installed (there are wheels for Linux)")
