"""What pages point to exists: links, anchors, paths, commands with their flags, imports.

A page is any Markdown file that git tracks. Commands are read from code blocks marked sh, bash,
shell or console and from code in running text; `...` in a command stands for flags left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from benchmarks.tables.pages import pages
from tests.helpers import programs

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [path.relative_to(ROOT).as_posix() for path in pages(ROOT)]
TOP = ("engine/", "kernels/", "model/", "scripts/", "tests/", "benchmarks/", ".github/", ".ci/")
SHELL = {"sh", "bash", "shell", "console"}
FENCE = re.compile(r"^ {0,3}(```+|~~~+) *(\w*)")
CODE_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK_TEXT = r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]"  # brackets may stand in it once
LINK = re.compile(LINK_TEXT + r"\(\s*<?([^\s()<>]+)>?[^)]*\)")
DEFINED_LINK = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s.*)?$", re.MULTILINE)
REAL_RUNS = ("--help", "--help-all", "--check", "--list")  # commands that take seconds


# ---- reading a page


def code_blocks(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The page without its code blocks, and (language, content) of each of them."""
    kept, found, inside, fence = [], [], [], None
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence is None and mark:
            fence, language, inside = mark[1], mark[2], []
        elif fence is not None and mark and mark[1].startswith(fence) and not mark[2]:
            found.append((language, "\n".join(inside)))
            fence = None
        elif fence is not None:
            inside.append(line)
        else:
            kept.append(line)
    return "\n".join(kept), found


def code_spans(text: str) -> list[str]:
    """Code in running text, each on one line."""
    prose, _ = code_blocks(text)
    spans = []
    for paragraph in re.split(r"\n\s*\n", prose):
        spans += [" ".join(span[2].split()) for span in CODE_SPAN.finditer(paragraph)]
    return spans


def links(text: str) -> list[str]:
    """Targets of all links and images outside of code."""
    prose, _ = code_blocks(text)
    prose = CODE_SPAN.sub("code", prose)
    return LINK.findall(prose) + DEFINED_LINK.findall(prose)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading, but for the numbers of repeated ones."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link shows its text
    heading = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of a page: of its headings, and those set by HTML."""
    prose, _ = code_blocks(text)
    found = set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", prose))
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", prose, re.MULTILINE):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken(page: Path, root: Path) -> Iterator[str]:
    """The page's links that lead nowhere, each with the reason."""
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (root / path[1:] if path.startswith("/") else page.parent / path).resolve()
        if not path:
            file = page.resolve()
        if not file.is_relative_to(root.resolve()):
            yield f"{target}: leads out of the repository"
        elif not file.exists():
            yield f"{target}: {path} does not exist"
        elif anchor and file.suffix == ".md":
            known = anchors(file.read_text(encoding="utf-8"))
            if anchor not in known:
                yield f"{target}: no such heading; there are {', '.join(sorted(known))}"


def missing_path(span: str, root: Path) -> str | None:
    """The path that a code span names and that does not exist; None where all is well."""
    words = span.split()
    if not words or not words[0].startswith(TOP):
        return None
    path = re.sub(r"(::.*|:\d+(-\d+)?|[,;.:])$", "", words[0])
    parts = [part.split(".")[0] for part in Path(path).parts]
    stand_in = [p for p in parts if p.isupper() and p not in ("README", "CONTRIBUTING", "LICENSE")]
    if stand_in or any(sign in path for sign in "<>$()"):
        return None  # a form of a path, as engine/NAME.py or tests/<room>/
    names = [path]
    while brace := next((m for n in names if (m := re.search(r"\{([^{}]*)\}", n))), None):
        whole = next(n for n in names if brace[0] in n)
        names.remove(whole)
        names += [whole.replace(brace[0], choice, 1) for choice in brace[1].split(",")]
    for name in names:
        there = list(root.glob(name.rstrip("/"))) if "*" in name else [root / name]
        if not any(each.exists() for each in there):
            return name
    return None


# ---- commands


class Shown(Exception):
    """Carries the parser out of a `parse_args` that is about to read the command line."""


def commands(text: str) -> list[str]:
    """Commands of the page that start python or a shell script, each on one line."""
    _, found = code_blocks(text)
    lines = [
        line
        for language, content in found
        if language in SHELL
        for line in re.sub(r"\\\n\s*", " ", content).splitlines()
    ]
    lines += code_spans(text)
    return [line for line in lines if re.search(r"\b(python3?|torchrun|bash) ", line)]


def split(command: str) -> tuple[str | None, list[str]]:
    """(script or module, its arguments) of a command; None where it starts neither."""
    try:
        words = shlex.split(re.sub(r"(?<!\S)[\[\]]|[\[\]](?!\S)", " ", command), comments=True)
    except ValueError:
        return None, []  # half a command in running text
    for i, word in enumerate(words):
        if word in ("|", "&&", ";", ">"):
            return None, []
        if word.endswith((".py", ".sh")) and word.lstrip("./").startswith(TOP):
            return word, words[i + 1 :]
        if word == "-m" and words[i + 1 :] and words[i + 1].startswith(("benchmarks", "tests")):
            return words[i + 1], words[i + 2 :]
    return None, []


@functools.cache
def load(target: str) -> ModuleType:
    """The module of a script or of `python -m`; ImportError where there is none."""
    if target.endswith(".py"):
        path = ROOT / target
        if not path.exists():
            raise ImportError(f"{target} does not exist")
        spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    found = importlib.util.find_spec(target)
    if found is None:
        raise ImportError(f"there is no module {target}")
    inner = f"{target}.__main__" if found.submodule_search_locations else target
    return importlib.import_module(inner)


def parser_of(module: ModuleType, monkeypatch) -> argparse.ArgumentParser | None:
    """The parser of a module's `parse_args`, which is not run further; None without one."""
    if not hasattr(module, "parse_args"):
        return None

    def show(self, *args, **kwargs):
        raise Shown(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", show)
        try:
            module.parse_args()
        except Shown as shown:
            return shown.args[0]
    raise AssertionError(f"{module.__name__}.parse_args reads no command line")


def refusal(command: str, partial: bool, monkeypatch, capsys) -> str | None:
    """Why the command cannot be typed as it stands; None when it can.

    partial: flags may be left out, as in running text or where `...` stands.
    """
    target, arguments = split(command)
    if target is None:
        return None
    if target.endswith(".sh"):
        return None if (ROOT / target).exists() else f"{target} does not exist"
    try:
        parser = parser_of(load(target), monkeypatch)
    except ImportError as error:
        return str(error)
    arguments = [word for word in arguments if word not in ("...", "…")]
    if parser is None or set(arguments) & {"-h", *REAL_RUNS[:2]}:
        return None
    if partial:
        for action in parser._actions:
            action.required = False
    parser.allow_abbrev = False
    try:
        _, unknown = parser.parse_known_args(arguments)
    except SystemExit:
        return capsys.readouterr().err.strip().splitlines()[-1]
    if partial:
        unknown = [word for word in unknown if word.startswith("-")]
    return f"unknown: {' '.join(unknown)}" if unknown else None


# ---- the pages of this clone


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    assert list(broken(ROOT / page, ROOT)) == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page):
    spans = code_spans((ROOT / page).read_text(encoding="utf-8"))
    assert [span for span in spans if missing_path(span, ROOT)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    in_prose = set(code_spans(text))
    refused = {}
    for command in commands(text):
        partial = "..." in command or command in in_prose
        reason = refusal(command, partial, monkeypatch, capsys)
        if reason:
            refused[command] = reason
    assert refused == {}


@pytest.mark.parametrize("page", PAGES)
def test_imports_of_python_examples_work(page):
    _, found = code_blocks((ROOT / page).read_text(encoding="utf-8"))
    for language, content in found:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {', '.join(missing)}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def quick_commands() -> list[str]:
    found: dict[str, None] = {}
    for page in PAGES:
        for command in commands((ROOT / page).read_text(encoding="utf-8")):
            target, arguments = split(command)
            if target and not target.endswith(".sh") and set(arguments) & set(REAL_RUNS):
                found[shlex.join([target, *arguments])] = None
    return list(found)


@pytest.mark.parametrize("command", quick_commands())
def test_quick_commands_run(command):
    target, *arguments = shlex.split(command)
    if target.endswith(".py"):
        command = [sys.executable, ROOT / target, *arguments]
        done = programs.run(command, cwd=ROOT, timeout=300)
    else:  # benchmarks choose what they import
        command = [sys.executable, "-m", target, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the rules themselves


def test_rule_of_anchors():
    text = "# A `b`, C's **d**!\n## Same\n## Same\n```\n# code\n```\n### [Link](x.md) -- end\n"
    text += '<a id="by-hand"></a>\n## x_y: 1/2 (z) ##\n'
    assert anchors(text) == {
        "a-b-cs-d",
        "same",
        "same-1",
        "link----end",
        "by-hand",
        "x_y-12-z",
    }


def test_rule_of_links(tmp_path):
    (tmp_path / "a.md").write_text("# One\n")
    (tmp_path / "b").mkdir()
    page = tmp_path / "b" / "page.md"
    page.write_text(
        "# Here (and there)\n"
        "[good](../a.md) [anchor](../a.md#one) ![own](#here-and-there) [folder](..) [web](https://x)\n"
        "[def][d] `[code](no.md)` [titled](../a.md 'title')\n\n[d]: ../none.md\n"
        "[bad](c.md) [anchor](../a.md#two) [out](../../x.md) [[n]](no.png)\n"
        "```\n[code](no.md)\n```\n"
    )
    said = list(broken(page, tmp_path))
    assert [line.split(":")[0] for line in said] == [
        "c.md",
        "../a.md#two",
        "../../x.md",
        "no.png",
        "../none.md",
    ]
    assert "no such heading; there are one" in said[1] and "out of the repository" in said[2]


@pytest.mark.parametrize(
    ("span", "missing"),
    [
        ("engine/__init__.py", None),
        ("engine/__init__.py:12", None),
        ("tests/conftest.py::need", None),
        ("scripts/train.py --show 2", None),
        ("benchmarks/results/*.jsonl", None),
        ("benchmarks/results/{step,train}.jsonl", None),
        ("benchmarks/results/NAME.jsonl", None),
        ("tests/<room>/", None),
        ("runs/mine", None),
        ("engine/no_such_file.py", "engine/no_such_file.py"),
        ("tests/*.jsonl", "tests/*.jsonl"),
        ("benchmarks/results/{step,none}.jsonl", "benchmarks/results/none.jsonl"),
        ("benchmarks/results/README.rst", "benchmarks/results/README.rst"),
    ],
)
def test_rule_of_paths(span, missing):
    assert missing_path(span, ROOT) == missing


@pytest.mark.parametrize(
    ("command", "partial", "said"),
    [
        ("python scripts/merge.py --model M --adapter A --out O  # note", False, None),
        ("python scripts/merge.py --model M", False, "the following arguments are required"),
        ("python scripts/merge.py --model M ... --out O", True, None),
        ("python scripts/merge.py ... --modle M", True, "unknown flag --modle"),
        ("A=1 torchrun --nproc-per-node 2 scripts/merge.py --model M", True, None),
        ("python scripts/merge.py --mod M", True, "unknown flag --mod;"),
        ("python scripts/merge.py --model M --adapter A --out O --colour red", False, "colour"),
        ("python scripts/none.py", False, "scripts/none.py does not exist"),
        ("bash scripts/none.sh", False, "scripts/none.sh does not exist"),
        ("python -m benchmarks.none", False, "no module benchmarks.none"),
        ("python -m benchmarks.tables --check", False, None),
        ("python -m benchmarks.tables [--check]", True, None),
        ("python -m pip install x", False, None),
        ("python scripts/merge.py --help", False, None),
    ],
)
def test_rule_of_commands(command, partial, said, monkeypatch, capsys):
    reason = refusal(command, partial, monkeypatch, capsys)
    assert reason is None if said is None else re.search(said, reason)


def test_rule_of_reading_commands():
    text = (
        "Run `python -m benchmarks.tables\n--check`.\n\n```sh\npython a.py \\\n    --b 1\nls\n```\n"
    )
    text += "```python\npython = 1\n```\n```bash\nbash scripts/x.sh\n```\n"
    assert commands(text) == [
        "python a.py  --b 1",
        "bash scripts/x.sh",
        "python -m benchmarks.tables --check",
    ]
