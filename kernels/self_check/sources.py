"""Which source files the result of a check depends on

The files of the functions that are checked and of the definition that they are held to, and all
that these import from kernels/, at any depth; of the tile configurations the rows of their kernels
for this class of device. (On a CPU the C sources are in the name of the compiled library.)
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kernels.launch import tile_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kernels"
FROM = rf"^\s*from\s+({PACKAGE}[\w.]*)\s+import\s+(\([^)]*\)|[^\n]*)"
IMPORT = rf"^\s*import\s+({PACKAGE}[\w.]*)"


@dataclass(frozen=True)
class Source:
    """A file of Python."""

    hash: str  # of its content
    imports: frozenset[str]  # modules of kernels/ that it names in an import, anywhere in it
    kernels: frozenset[str]  # kernels with tile configurations whose name is in it


class Sources:
    """The source files of kernels/, each read once, and the hash of those that a check needs."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.read: dict[Path, Source] = {}

    def of(self, path: Path) -> Source:
        """The file, read if it is asked for the first time."""
        if path not in self.read:
            content = path.read_bytes()
            text = content.decode()
            words = set(re.findall(r"\w+", text))
            self.read[path] = Source(
                hashlib.sha256(content).hexdigest(),
                frozenset(imported(text)),
                frozenset(words & tile_config.configurations().keys()),
            )
        return self.read[path]

    def path_of(self, module: str) -> Path | None:
        """The file of a module of kernels/; None if the name is not one."""
        place = self.root.joinpath(*module.split("."))
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
        return None

    def closure(self, modules: Iterable[str]) -> list[Path]:
        """The files of these modules of kernels/ and of all that they import from there."""
        found: set[Path] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            package, _, _ = module.rpartition(".")
            if package:  # importing a module imports its package
                waiting.append(package)
            path = self.path_of(module)
            if path is not None and path not in found:
                found.add(path)
                waiting += self.of(path).imports
        return sorted(found)

    def hash_for(self, functions: Iterable[Callable], modules: Iterable[str], device: str) -> str:
        """Hash of all that a check of these functions depends on, for a class of device.

        modules: of kernels/, which the check needs beside those of the functions.
        """
        names = {function.__module__ for function in functions} | set(modules)
        ours = {name for name in names if name.split(".")[0] == PACKAGE}
        files = self.closure(ours)
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.relative_to(self.root)} {self.of(path).hash}\n".encode())
        for name in sorted(names - ours):  # a function from elsewhere
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is not None:
                digest.update(
                    f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}\n".encode()
                )
        rows = tile_rows(set().union(*(self.of(path).kernels for path in files)), device)
        digest.update(json.dumps(rows, sort_keys=True).encode())
        return digest.hexdigest()


def tile_rows(kernels: Iterable[str], device: str) -> dict[str, dict]:
    """The configurations of these kernels for a class of device, without their `from`."""
    rows: dict[str, dict] = {}
    for kernel in sorted(kernels):
        by_shape = tile_config.configurations()[kernel].get(device, {})
        rows[kernel] = {
            shape: {name: value for name, value in config.items() if name != "from"}
            for shape, config in by_shape.items()
        }
    return rows


def imported(text: str) -> set[str]:
    """The modules of kernels/ that a file may import: `from kernels import a` gives kernels.a.

    The statements are found by a pattern, anywhere in the file: this is done at every start.
    """
    names = set()
    for module, listed in re.findall(FROM, text, re.MULTILINE):
        names.add(module)
        names |= {f"{module}.{name}" for name in re.findall(r"\w+", listed)}
    return names | set(re.findall(IMPORT, text, re.MULTILINE))
