r"""The number that a text ends in: `last_number(text) -> Fraction | str | None`

The value is exact. Numbers are read in English notation. Besides plain digits these are read:

    signs, groups   -5, also with the minus sign or an en dash; 1,234, with no-break spaces or as
                    LaTeX writes it (1{,}234); full-width digits; currency and percent do not count
    fractions       3/4, 1 1/2, \frac{3}{4}, 3\frac{1}{2}
    powers          2^{10}, 2**10, 10^-3, 1e3, 1.5 x 10^3, and raised digits
    units           20 cm^2, 20 m2, 9.8 m/s^2, 90^\circ are 20, 20, 9.8 and 90
    \boxed{...}     the last one is the answer, whatever follows it

Where the last number is part of an expression that is not a plain number (3\sqrt{2}, 20x^2,
2\pi, 3:30), the expression is returned as text without spaces: it equals itself and nothing else.
Number words ("two") are not read, nor are coordinates and intervals: of (2, 3) the 3 is taken.

Every pattern takes time linear in the text: each repetition is bounded, or can match in one way
only.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Commas and no-break spaces group digits by three and only so: "1, 2" are two numbers, as are
# "1 200".
_GROUP_SIGN = r"[,\u00a0\u202f\u2009]"
_GROUPS = rf"[0-9]{{1,3}}(?:{_GROUP_SIGN}[0-9]{{3}})+(?![0-9])"
_DIGITS = rf"(?:{_GROUPS}|[0-9]+)(?:\.[0-9]+)?"
# A minus is a sign where no operand stands before it ("5-3" holds 5 and 3), also before a currency
# sign ("-$5").
_CURRENCY = r"[$€£¥]?"
_SIGN = rf"(?<![\w.)\]%])[-\u2212\u2013](?={_CURRENCY}[.0-9])"
_BARE_DECIMALS = r"(?<![\w.])\.[0-9]+"  # .5
# a/b is one number, so that 1/4 does not pass for 3/4; but 12/5/2024 is a date.
_DENOMINATOR = rf"/({_DIGITS})(?![0-9/]|\.[0-9])"
# Its groups: sign, numerator, denominator.
_NUMBER = re.compile(rf"({_SIGN})?{_CURRENCY}({_DIGITS}|{_BARE_DECIMALS})(?:{_DENOMINATOR})?")
_GROUPING = re.compile(_GROUP_SIGN)
_MAX_DIGITS = 400  # characters of a number; int() may refuse a longer one

# Characters of East Asian full width, by code point.
_FULL_WIDTH_DIGITS = {0xFF10 + digit: str(digit) for digit in range(10)}
_FULL_WIDTH_SIGNS = {
    0xFF0E: ".", 0xFF0C: ",", 0xFF0D: "-", 0xFF05: "%", 0xFF0F: "/", 0xFF1A: ":", 0xFF04: "$",
}  # fmt: skip
_FULL_WIDTH = _FULL_WIDTH_DIGITS | _FULL_WIDTH_SIGNS
# Raised digits and the raised minus: an exponent behind a letter, a digit or a closing bracket.
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_EXPONENT = re.compile(rf"(?<=[\w)\]])[{_RAISED}]{{1,9}}")
_LOWERED = str.maketrans(_RAISED, "0123456789-")

_LENGTHS = "mm|cm|dm|m|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|met(?:er|re)s?|miles?|units?"
_UNITS = rf"{_LENGTHS}|s|sec|seconds?|min|minutes?|hr|hours?|kg|lbs?|mol"
# (pattern, replacement), applied in this order: each writes one notation in a single way.
_REWRITES = (
    # LaTeX: layout and thin spaces are removed, other spaces are a space
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!]", ""),
    (r"\\[;: ]|~", " "),
    # LaTeX: a comma that groups digits; \% and \$; text in a font
    (r"\{,\}", ","),
    (r"\\([%$])", r"\1"),
    (r"\\(?:text|textbf|textrm|mathrm|mathbf|operatorname|mbox)\{([^{}]{0,200})\}", r" \1"),
    # LaTeX: the degree sign, roots, pi, the multiplication sign
    (r"[ ]?\^\{?\\circ\}?|\\degree\b", "\u00b0"),
    (r"\\sqrt(?:\[([0-9]{1,3})\])?\{([^{}]{0,200})\}", "\u221a\\1(\\2)"),
    (r"\\sqrt[ ]?(?=\w)", "\u221a"),
    (r"\\pi(?![A-Za-z])", "\u03c0"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "\u00d7"),
    # exponents: 2**10, 20 cm$^2$ and 2^{10} with a single ^
    (r"(?<=[0-9])\*\*(?=[-0-9])", "^"),
    (r"\$\^", "^"),
    (r"\^\{([^{}]{0,50})\}", r"^\1"),
    # \frac12 with its braces
    (r"\\[dt]?frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    # units without their exponent: cm^2, m/s^2, m2
    (rf"(?<![A-Za-z])({_UNITS})[ ]?\^\(?-?[0-9]\)?(?![0-9A-Za-z])", r"\1"),
    (rf"(?<![A-Za-z])({_LENGTHS})[23](?![0-9A-Za-z])", r"\1"),
    # products with roots and pi, and exponents, without spaces and multiplication sign
    (r"(?<=[0-9)\u03c0])[ ]+(?=[\u221a\u03c0^])", ""),
    (r"(?<=[0-9)\u03c0])[ ]?\u00d7[ ]?(?=[\u221a\u03c0])", ""),
    (r"(?<=[\u221a^])[ ]+(?=[0-9(])", ""),
)
_COMPILED_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]
# Its groups: a whole number before it, numerator, denominator.
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
# Signs of an expression that is not a plain number: ^, root, pi, the bar of a fraction.
_NO_PLAIN_NUMBER = re.compile(r"[\^\u221a\u03c0\u2044]")
_CLOCK = re.compile(r"(?:[0-9]{1,9}:){1,3}\Z")  # 3:30, and ratios
# The text on both sides of a number that belongs to its expression: up to a space, an equals sign
# or punctuation, and beyond spaces around an operator ("x^2 + 3").
_BREAKS = r"\s=\u2248$;,\"'`"
_BEFORE = re.compile(rf"(?:[^{_BREAKS}]{{1,80}} [-+\u2212\u00d7*/] ){{0,8}}[^{_BREAKS}]{{0,80}}\Z")
_AFTER = re.compile(rf"[^{_BREAKS}]{{0,80}}(?: [-+\u2212\u00d7*/] [^{_BREAKS}]{{1,80}}){{0,8}}")


def last_number(text: str) -> Fraction | str | None:
    """The last number in the text; None if there is none.

    A string where the number belongs to an expression that is not a plain number: the expression,
    as described at the top of this file.
    """
    text = _normalised(_boxed(text))
    numbers = list(_NUMBER.finditer(text))
    if not numbers or len(numbers[-1][0]) > _MAX_DIGITS:
        return None
    number = numbers[-1]
    text_before = text[max(0, number.start() - 200) : number.start()]
    clock = _CLOCK.search(text_before)
    if clock:
        return clock[0] + number[0]
    expression = _expression_around(text, text_before, number)
    if _NO_PLAIN_NUMBER.search(expression):
        expression = re.sub(r"[\s{}\\]", "", expression)
        expression = re.sub(r"\u221a\((\w+)\)", "\u221a\\1", expression)
        return expression.strip(".!?*_")
    sign, numerator, denominator = number.groups()
    divisor = _plain_fraction(denominator or "1")
    if divisor == 0:
        return None
    value = _plain_fraction(numerator) / divisor
    return -value if sign else value


def _boxed(text: str) -> str:
    """The content of the last \\boxed{...} if it holds a digit; else the whole text."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth = 1
    end = start
    while end < len(text) and depth > 0:
        if text[end] == "{":
            depth += 1
        elif text[end] == "}":
            depth -= 1
        end += 1
    is_closed = depth == 0
    inside = text[start : end - 1] if is_closed else text[start:end]
    return inside if re.search(r"[0-9\uff10-\uff19]", inside) else text


def _normalised(text: str) -> str:
    """The text with every notation for numbers written in a single way."""
    text = text.translate(_FULL_WIDTH)
    text = _EXPONENT.sub(lambda raised: "^" + raised[0].translate(_LOWERED), text)
    for pattern, replacement in _COMPILED_REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(4):  # fractions within fractions, the innermost first
        text, count = _FRACTION.subn(_as_fraction, text)
        if count == 0:
            break
    text = _MIXED.sub(_as_improper, text)
    text = _SCIENTIFIC.sub(_as_scientific, text)
    return _POWER.sub(_as_power, text)


def _as_fraction(match: re.Match[str]) -> str:
    """\\frac{a}{b} as a/b, 2\\frac{a}{b} as 2 a/b; (a)\u2044(b) if one of them is not a number."""
    whole = match[1]
    top = match[2].strip()
    bottom = match[3].strip()
    if _WHOLE.fullmatch(top) and _WHOLE.fullmatch(bottom):
        space = " " if whole else ""
        return f"{whole}{space}{top}/{bottom}"
    return f"{whole}({top})\u2044({bottom})"


def _as_improper(match: re.Match[str]) -> str:
    """1 1/2 as 3/2; other pairs of a number and a fraction as they are."""
    whole = int(match[1])
    top = int(match[2])
    bottom = int(match[3])
    if 0 < top < bottom:
        return f"{whole * bottom + top}/{bottom}"
    return match[0]


def _as_scientific(match: re.Match[str]) -> str:
    """1.5e3 and 1.5 x 10^3 in digits."""
    return _scaled_power(match[0], Fraction(match[1]), "10", match[2])


def _as_power(match: re.Match[str]) -> str:
    """2^10 in digits."""
    return _scaled_power(match[0], Fraction(1), match[1], match[2])


def _scaled_power(written: str, factor: Fraction, base: str, exponent: str) -> str:
    """factor * base ** exponent in digits; `written` where it has no value or too many digits."""
    power = int(exponent.replace("\u2212", "-"))
    divides_by_zero = power < 0 and Fraction(base) == 0
    if divides_by_zero or len(base) * abs(power) > _MAX_DIGITS:
        return written
    return str(factor * Fraction(base) ** power)


def _expression_around(text: str, text_before: str, number: re.Match[str]) -> str:
    """The number with the text on both sides that belongs to the same expression."""
    expression = number[0]
    before = _BEFORE.search(text_before)
    if before is not None:
        expression = before[0] + expression
    after = _AFTER.match(text, number.end())
    if after is not None:
        expression = expression + after[0]
    return expression


def _plain_fraction(digits: str) -> Fraction:
    """The value of digits, which may have grouping signs and a decimal point."""
    return Fraction(_GROUPING.sub("", digits))
