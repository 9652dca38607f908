"""The check of an audit: no autograd, no unpickling, no foreign package, nothing hidden."""

from __future__ import annotations

import re
import sys
from html import unescape

from engine.jobs.audit_records import Trace
from engine.jobs.audit_source import FLOORS
from engine.jobs.audit_trace import function_of

COMPUTING = {"torch", "numpy", "triton"}  # packages that an optimizer step may call
# packages that distillation calls too: chat templates, tokenizers, progress bars
READING_TEXT = {"jinja2", "markupsafe", "sentencepiece", "tokenizers", "tqdm", "safetensors"}
ALLOWED = {
    "step": COMPUTING,
    "decode": COMPUTING | READING_TEXT,
    "distill": COMPUTING | READING_TEXT,
}
ANCHOR = re.compile(r'<section id="([^"]+)"')  # of a function on the page


def violations(trace: Trace, page: str, allowed: set[str] = COMPUTING) -> list[str]:
    """A sentence for every violation.

    page       the HTML that was written of this trace
    allowed    packages that may be called beside the standard library
    """
    found = [f"autograd: {sentence}" for sentence in trace.autograd]
    found += [f"unpickling: {sentence}" for sentence in trace.pickling]

    for package, caller in trace.packages.items():
        known = package in allowed or package in FLOORS or package in sys.stdlib_module_names
        if package and not known:
            found.append(f"package: {caller} calls {package}, which is not a core package")

    shown = {unescape(anchor) for anchor in ANCHOR.findall(page)}
    for name in sorted(ran(trace) - shown):
        found.append(f"hidden: {name} ran and the page does not show it")
    return found


def ran(trace: Trace) -> set[str]:
    """Names of all functions of ours that ran, independent of the records that make the page."""
    names = trace.kernels | trace.c_functions
    for code in trace.seen:
        function = function_of(code)
        if function is not None:
            names.add(function.name)
    return names
