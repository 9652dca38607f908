"""The check of an audit: no autograd, no unpickling, no foreign package, nothing hidden."""

from __future__ import annotations

import re
import sys
from html import unescape

from engine.jobs.audit_source import FLOORS
from engine.jobs.audit_trace import Trace, function_of

COMPUTING = {"torch", "numpy", "triton"}  # what an optimizer step may call
# what distillation calls besides: chat templates, tokenizers, progress bars
READING_TEXT = {"jinja2", "markupsafe", "sentencepiece", "tokenizers", "tqdm", "safetensors"}
ALLOWED = {
    "step": COMPUTING,
    "decode": COMPUTING | READING_TEXT,
    "distill": COMPUTING | READING_TEXT,
}
ANCHOR = re.compile(r'<section id="([^"]+)"')


def violations(trace: Trace, page: str, allowed: set[str] = COMPUTING) -> list[str]:
    """Sentences about what must not be; [] where all is well.

    page: the HTML that was written of this trace. allowed: packages that may be called beside the
    standard library.
    """
    found = [f"autograd: {said}" for said in trace.autograd]
    found += [f"unpickling: {said}" for said in trace.pickling]
    for package, caller in trace.packages.items():
        known = package in allowed or package in FLOORS or package in sys.stdlib_module_names
        if package and not known:
            found.append(f"package: {caller} calls {package}, which is not a core package")
    shown = {unescape(anchor) for anchor in ANCHOR.findall(page)}
    hidden = sorted(ran(trace) - shown)
    return found + [f"hidden: {name} ran and the page does not show it" for name in hidden]


def ran(trace: Trace) -> set[str]:
    """Names of all functions of ours that ran, not counting on the records that make the page."""
    functions = (function_of(code) for code in trace.seen)
    names = {function.name for function in functions if function is not None}
    return names | trace.kernels | trace.c_functions
