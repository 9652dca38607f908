r"""The number that a text ends in: `last_number(text) -> Fraction | str | None`

English notation, exactly. Understood besides plain digits:

    signs, groups   -5, also with the minus sign or an en dash; 1,234, with no-break spaces or as
                    LaTeX writes it (1{,}234); full-width digits; currency and percent do not count
    fractions       3/4, 1 1/2, \frac{3}{4}, 3\frac{1}{2}
    powers          2^{10}, 2**10, 10^-3, 1e3, 1.5 x 10^3, and raised digits
    units           20 cm^2, 20 m2, 9.8 m/s^2, 90^\circ are 20, 20, 9.8 and 90
    \boxed{...}     the last one is the answer, whatever follows it

Where the last number is part of something that is no plain number (3\sqrt{2}, 20x^2, 2\pi, 3:30),
that is returned as text without spaces: it equals itself and nothing else. Number words are not
understood, nor are coordinates and intervals: of (2, 3) the 3 is taken.

All patterns are linear in the text: what repeats is bounded or cannot match in two ways.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A minus is a sign where no operand stands before it ("5-3" holds 5 and 3), also before a currency
# sign ("-$5"). Commas and no-break spaces group digits by three and only so: "1, 2" are two
# numbers, as are "1 200". a/b is one number, so that 1/4 does not pass for 3/4.
_DIGITS = r"(?:[0-9]{1,3}(?:[,\u00a0\u202f\u2009][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER = re.compile(
    rf"((?<![\w.)\]%])[-\u2212\u2013](?=[$€£¥]?[.0-9]))?[$€£¥]?({_DIGITS}|(?<![\w.])\.[0-9]+)"
    rf"(?:/({_DIGITS})(?![0-9/]|\.[0-9]))?"
)
_GROUPING = re.compile(r"[,\u00a0\u202f\u2009]")
_LONGEST = 400  # characters of a number: no longer one is meant, and int() may refuse it

_FULL_WIDTH = {0xFF10 + n: str(n) for n in range(10)} | {
    0xFF0E: ".", 0xFF0C: ",", 0xFF0D: "-", 0xFF05: "%", 0xFF0F: "/", 0xFF1A: ":", 0xFF04: "$",
}  # fmt: skip
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_EXPONENT = re.compile(rf"(?<=[\w)\]])[{_RAISED}]{{1,9}}")
_LOWERED = str.maketrans(_RAISED, "0123456789-")

_LENGTHS = "mm|cm|dm|m|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|met(?:er|re)s?|miles?|units?"
_UNITS = rf"{_LENGTHS}|s|sec|seconds?|min|minutes?|hr|hours?|kg|lbs?|mol"
# What is written in several ways, in the order in which it is made one way.
_SAME = [
    (re.compile(pattern), made)
    for pattern, made in (
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!]", ""),
        (r"\\[;: ]|~", " "),
        (r"\{,\}", ","),
        (r"\\([%$])", r"\1"),
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|operatorname|mbox)\{([^{}]{0,200})\}", r" \1"),
        (r"[ ]?\^\{?\\circ\}?|\\degree\b", "\u00b0"),
        (r"\\sqrt(?:\[([0-9]{1,3})\])?\{([^{}]{0,200})\}", "\u221a\\1(\\2)"),
        (r"\\sqrt[ ]?(?=\w)", "\u221a"),
        (r"\\pi(?![A-Za-z])", "\u03c0"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "\u00d7"),
        (r"(?<=[0-9])\*\*(?=[-0-9])", "^"),
        (r"\$\^", "^"),
        (r"\^\{([^{}]{0,50})\}", r"^\1"),
        (r"\\[dt]?frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
        (rf"(?<![A-Za-z])({_UNITS})[ ]?\^\(?-?[0-9]\)?(?![0-9A-Za-z])", r"\1"),
        (rf"(?<![A-Za-z])({_LENGTHS})[23](?![0-9A-Za-z])", r"\1"),
        (r"(?<=[0-9)\u03c0])[ ]+(?=[\u221a\u03c0^])", ""),
        (r"(?<=[0-9)\u03c0])[ ]?\u00d7[ ]?(?=[\u221a\u03c0])", ""),
        (r"(?<=[\u221a^])[ ]+(?=[0-9(])", ""),
    )
]
_FRACTION = re.compile(r"([0-9]?)[ ]?\\[dt]?frac[ ]?\{([^{}]{0,200})\}[ ]?\{([^{}]{0,200})\}")
_WHOLE = re.compile(rf"-?{_DIGITS}")
_MIXED = re.compile(r"(?<![\w.,/])([0-9]{1,6}) ([0-9]{1,4})/([0-9]{1,4})(?![0-9/]|\.[0-9])")
_SCIENTIFIC = re.compile(
    r"(?<![\w.,^\u221a)])([0-9]{1,20}(?:\.[0-9]{1,20})?)"
    r"(?:[eE]|[ ]?[x*\u00d7\u00b7][ ]?10\^)\(?([-+\u2212]?[0-9]{1,3})\)?"
    r"(?![\w^(\u221a\u03c0]|\.[0-9])"
)
_POWER = re.compile(
    r"(?<![\w.,^\u221a)])([0-9]{1,20}(?:\.[0-9]{1,20})?)\^\(?([-\u2212]?[0-9]{1,3})\)?"
    r"(?![\w^(\u221a\u03c0]|\.[0-9])"
)
# Signs of something that is no plain number, and the text around a number that belongs to it.
_NO_NUMBER = re.compile(r"[\^\u221a\u03c0\u2044]")
_CLOCK = re.compile(r"(?:[0-9]{1,9}:){1,3}\Z")  # 3:30, and ratios
_ENDS = r"\s=\u2248$;,\"'`"
_BEFORE = re.compile(rf"(?:[^{_ENDS}]{{1,80}} [-+\u2212\u00d7*/] ){{0,8}}[^{_ENDS}]{{0,80}}\Z")
_BEHIND = re.compile(rf"[^{_ENDS}]{{0,80}}(?: [-+\u2212\u00d7*/] [^{_ENDS}]{{1,80}}){{0,8}}")


def last_number(text: str) -> Fraction | str | None:
    """The last number in the text; None if there is none.

    Text where it belongs to an expression that is no plain number; see the top of this file.
    """
    said = _one_way(_boxed(text))
    numbers = list(_NUMBER.finditer(said))
    if not numbers or len(numbers[-1][0]) > _LONGEST:
        return None
    found = numbers[-1]
    said_before = said[max(0, found.start() - 200) : found.start()]
    if clock := _CLOCK.search(said_before):
        return clock[0] + found[0]
    before = _BEFORE.search(said_before)
    behind = _BEHIND.match(said, found.end())
    whole = f"{before[0] if before else ''}{found[0]}{behind[0] if behind else ''}"
    if _NO_NUMBER.search(whole):
        whole = re.sub(r"\u221a\((\w+)\)", "\u221a\\1", re.sub(r"[\s{}\\]", "", whole))
        return whole.strip(".!?*_")
    sign, top, bottom = found.groups()
    divisor = Fraction(_GROUPING.sub("", bottom or "1"))
    if not divisor:
        return None
    return (-1 if sign else 1) * Fraction(_GROUPING.sub("", top)) / divisor


def _boxed(text: str) -> str:
    """What the last \boxed{...} holds, where that is a number; else the text."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth, end = 1, start
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    inside = text[start : end - (not depth)]
    return inside if re.search(r"[0-9\uff10-\uff19]", inside) else text


def _one_way(text: str) -> str:
    """The text with numbers written in one way only."""
    said = text.translate(_FULL_WIDTH)
    said = _EXPONENT.sub(lambda found: "^" + found[0].translate(_LOWERED), said)
    for pattern, made in _SAME:
        said = pattern.sub(made, said)
    for _ in range(4):  # fractions within fractions
        said, more = _FRACTION.subn(_as_fraction, said)
        if not more:
            break
    said = _MIXED.sub(_as_improper, said)
    return _POWER.sub(_as_power, _SCIENTIFIC.sub(_as_scientific, said))


def _as_fraction(found: re.Match[str]) -> str:
    before, top, bottom = found[1], found[2].strip(), found[3].strip()
    if _WHOLE.fullmatch(top) and _WHOLE.fullmatch(bottom):
        return f"{before}{' ' if before else ''}{top}/{bottom}"
    return f"{before}({top})\u2044({bottom})"


def _as_improper(found: re.Match[str]) -> str:
    whole, top, bottom = map(int, found.groups())
    return f"{whole * bottom + top}/{bottom}" if 0 < top < bottom else found[0]


def _as_scientific(found: re.Match[str]) -> str:
    return _value(found[0], Fraction(found[1]), "10", found[2])


def _as_power(found: re.Match[str]) -> str:
    return _value(found[0], Fraction(1), found[1], found[2])


def _value(written: str, factor: Fraction, base: str, exponent: str) -> str:
    """factor * base ** exponent in digits; as it was written where that is none, or too long."""
    power = int(exponent.replace("\u2212", "-"))
    if len(base) * abs(power) > _LONGEST or (power < 0 and not Fraction(base)):
        return written
    return str(factor * Fraction(base) ** power)
