"""A checkpoint's chat template, an untrusted program: Jinja in a sandbox, within limits.

The environment is the one that transformers gives a chat template. Beyond Jinja's own sandbox (no
private attributes, no change of an argument) a rendering has a budget:

    SECONDS      of this thread's processor time; a paused or crowded process loses nothing
    CHARACTERS   of text made on the way, and of the output; more where the conversation is long
    LARGEST      the largest whole number that a call or a filter may be handed

Loops, calls, filters and operators count against it, so that neither nested loops nor text that is
doubled again and again can hold up the program or fill its memory. Any exception inside a template,
not Jinja's alone, becomes a ValueError that names the template.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from model.terminal import visible

SECONDS = 10.0
CHARACTERS = 1 << 24
CHARACTERS_EACH = 256  # more for every character of the conversation
LARGEST = 1_000_000
LONGEST_REASON = 500  # characters of an exception's message that are shown


class TemplateLimit(Exception):
    """A template exceeded its limits of time or memory."""


class TemplateStopped(ValueError):
    """A template exceeded its limits, as the error that users see."""


class ChatTemplate:
    """A compiled template. `name` is how messages call it ("checkpoint", "llama2")."""

    def __init__(self, source: str, name: str, now: datetime) -> None:
        self.name = name
        self._source = source
        self._environment = _environment(now)
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # beside syntax errors RecursionError, OverflowError, ...
            raise ValueError(
                f"the {name} chat template is not valid Jinja: {_reason(error)}"
            ) from error

    def reads(self, variable: str) -> bool:
        """Whether the template reads a variable that it is given, rather than one of its own."""
        tree = self._environment.parse(self._source)
        return variable in jinja2.meta.find_undeclared_variables(tree)

    def render(self, length: int, **variables: Any) -> str:
        """The text; `length` is that of the conversation, in characters.

        ValueError where the template refuses the conversation, fails at it or breaks its limits.
        """
        budget = self._environment.budget
        budget.begin(length)
        pieces = []
        try:
            for piece in self._template.generate(**variables):
                budget.output(len(piece))
                pieces.append(piece)
        except TemplateLimit as error:
            raise TemplateStopped(
                f"the {self.name} chat template was stopped: {error}; ordinary chat templates need "
                "a fraction of that: look into it"
            ) from None
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the {self.name} chat template refuses this conversation: {_reason(error)}"
            ) from error
        except Exception as error:  # TypeError, KeyError, RecursionError, MemoryError, ...
            raise ValueError(
                f"the {self.name} chat template fails at this conversation: "
                f"{type(error).__name__}: {_reason(error)}"
            ) from error
        finally:
            budget.end()
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    """An exception's message, or its type's name, as one line of at most LONGEST_REASON
    characters."""
    text = visible(" ".join(str(error).split(" ")))
    line = " ".join(text.split("\n"))
    if not line:
        line = type(error).__name__
    if len(line) > LONGEST_REASON:
        line = line[:LONGEST_REASON] + " ..."
    return line


class _Budget:
    """The budget of the rendering under way in this thread; without one nothing is limited."""

    def __init__(self) -> None:
        self._own = threading.local()

    def begin(self, length: int) -> None:
        """Begin a rendering of a conversation of `length` characters."""
        self._own.most = CHARACTERS + CHARACTERS_EACH * length
        self._own.made = 0  # characters and items
        self._own.written = 0  # characters
        self._own.deadline = time.thread_time() + SECONDS

    def end(self) -> None:
        """End the rendering."""
        self._own.deadline = None

    def tick(self) -> None:
        """Count one step."""
        deadline = getattr(self._own, "deadline", None)
        if deadline is not None and time.thread_time() > deadline:
            raise TemplateLimit(f"it ran for more than {SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """Count one step and the size of its result, which is returned."""
        self.tick()
        if isinstance(value, (str, list, tuple)) and getattr(self._own, "deadline", None):
            self._own.made += len(value)
            if self._own.made > self._own.most:
                raise TemplateLimit(f"it made more than {self._own.most:,} characters of text")
        return value

    def output(self, count: int) -> None:
        """Count so many characters of output."""
        self._own.written += count
        if self._own.written > self._own.most:
            raise TemplateLimit(f"it wrote more than {self._own.most:,} characters")

    def counted(self, items: Iterable) -> Iterator:
        """`items`, each counted as a step."""
        for item in items:
            self.tick()
            yield item


def _check_numbers(values: Iterable[Any]) -> None:
    """TemplateLimit for a number (of characters, of repetitions) that asks for too much at once."""
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TemplateLimit(f"it used the number {_digits(value)}, the most is {LARGEST:,}")


def _check_texts(values: Iterable[Any]) -> None:
    """TemplateLimit for a list among the values whose texts are too long together."""
    for value in values:
        if isinstance(value, (list, tuple)):
            length = sum(len(item) for item in value if isinstance(item, str))
            _check_product(1, length)


def _check_widths(text: Any) -> None:
    """TemplateLimit for a format string that asks for a field of millions of characters."""
    if isinstance(text, str) and re.search(r"[1-9]\d{6}", text):
        raise TemplateLimit(f"it formats text {LARGEST:,} characters wide or wider")


def _digits(value: int) -> str:
    """A number for a message; a huge one by its size, since printing it takes long."""
    if value.bit_length() < 200:
        return str(value)
    return f"of {value.bit_length()} bits"


def _size(value: Any) -> int:
    """Characters of a text, items of a list, bits of a number; 0 for anything else."""
    if isinstance(value, int):
        return value.bit_length()
    if isinstance(value, (str, list, tuple)):
        return len(value)
    return 0


class _CountLoops(NodeTransformer):
    """Makes every loop and every `~` of a template count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return _filtered("_joined", parts)


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    """The node `{{ node | name }}`."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks an answer for trainers that mask by it; here it is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        tag = next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=tag.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which the steps of a template are counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        self.budget = _Budget()
        super().__init__(**settings)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _CountLoops().visit(tree)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # (named as in jinja2, so that no keyword of a call can be taken for them)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2's sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = _check_method(__self.budget, owner, method.__name__, args)
        _check_numbers([*args, *kwargs.values()])
        _check_texts(args)
        return __self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_numbers([right])
            if isinstance(right, int):
                _check_product(_size(left), right)
        elif operator == "*":
            both_numbers = isinstance(left, int) and isinstance(right, int)
            if both_numbers:
                _check_product(_size(left), _size(right))
            elif isinstance(left, int):
                _check_product(left, _size(right))
            elif isinstance(right, int):
                _check_product(_size(left), right)
        elif operator == "%":
            _check_widths(left)
        result = super().call_binop(context, operator, left, right)
        return self.budget.made(result)


def _check_method(budget: _Budget, text: str, name: str, args: tuple) -> tuple:
    """The arguments of a method of `text`, an iterator that is to be joined as a list.

    TemplateLimit where the result would be too long.
    """
    if name.startswith("format"):
        _check_widths(text)
    elif name == "replace" and len(args) > 1:
        old, new = args[:2]
        if isinstance(old, str) and isinstance(new, str):
            _check_product(text.count(old), len(new))
    elif name == "join" and args:
        items = list(budget.counted(args[0]))
        _check_product(len(text), len(items))
        return (items, *args[1:])
    return args


def _check_product(a: int, b: int) -> None:
    """TemplateLimit where something `a` large is to be made `b` times."""
    if a * b > CHARACTERS:
        raise TemplateLimit(f"it makes {_digits(a)} times {_digits(b)} at once")


def _counting(budget: _Budget, name: str, function: Callable) -> Callable:
    """A filter whose arguments are checked and whose result counts."""

    # the value's place among the arguments: jinja2 hands its environment or context to some filters
    # before it
    value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # also jinja2's marks on a filter, its attributes
    def counting(*args: Any, **kwargs: Any) -> Any:
        if name == "format" and args:
            _check_widths(args[0])
        if name == "replace":
            texts = [text for text in (*args, *kwargs.values()) if isinstance(text, str)]
            if len(texts) > 2:
                text, old, new = texts[:3]
                _check_product(text.count(old), len(new))
        if name == "join" and len(args) > value_at:
            before = args[:value_at]
            items = list(budget.counted(args[value_at]))
            after = args[value_at + 1 :]
            separators = [*after[:1], *kwargs.values()]
            longest = max((_size(separator) for separator in separators), default=0)
            _check_product(longest, len(items))
            args = (*before, items, *after)
        _check_numbers([*args[value_at + 1 :], *kwargs.values()])
        _check_texts(args)
        return budget.made(function(*args, **kwargs))

    return counting


def _environment(now: datetime) -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    numbers = re.findall(r"\d+", jinja2.__version__)
    version = tuple(int(number) for number in numbers[:3])
    if version < (3, 1, 6):  # older sandboxes can be escaped, and templates are untrusted
        raise ValueError(
            f"jinja2 {jinja2.__version__} cannot run a checkpoint's template safely -> "
            "pip install -U 'jinja2>=3.1.6'"
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own would escape <, >, & and ' for HTML.
        style = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **style)

    def joined(parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        _check_texts([texts])
        return budget.made("".join(texts))

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    budget = environment.budget
    environment.filters["tojson"] = tojson
    for name, function in environment.filters.items():
        environment.filters[name] = _counting(budget, name, function)
    environment.filters["_counted"] = budget.counted
    environment.filters["_joined"] = joined
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals.pop("lipsum")  # random text; transformers leaves it in by default
    return environment
