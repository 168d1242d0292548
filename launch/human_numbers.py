"""Numbers as people type them: `64k` tokens, `2k` steps, `1_000_000`, `1.5M`.

Context lengths are named in powers of two (a 64k model takes 65,536 tokens), everything else in powers
of ten; so there is one parser for tokens and one for the rest.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

_LOOKS_LIKE_A_NUMBER = re.compile(r"[+-]?\.?\d")
# A comma only where it groups thousands: `1,5k` is a decimal comma to half the world and must not be 15k.
# Two digits of exponent are plenty, and `1e999999999` would fill the memory.
_NUMBER = re.compile(
    r"""(?P<sign>[+-]?)
        (?P<whole>\d{1,3}(?:,\d{3})+ | \d+(?:_\d+)*)?
        (?P<part>\.\d*)?
        (?P<exponent>[eE][+-]?\d{1,2})?
        \s*(?P<suffix>[kKmMgG]?)""",
    re.VERBOSE,
)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


def parse_tokens(value: Any) -> Any:
    """Read a number of tokens, with binary suffixes: `64k` is 65,536 and `1M` is 1,048,576.

    Args:
        value: An int, a float without a fraction, or text such as `131072`, `131_072`, `131,072`, `128k`,
            `1.5M`.

    Returns:
        The number as an int. What is not like a number (`auto`, None, a list) comes back untouched, so that
        a field may allow words beside numbers.

    Raises:
        ValueError: A truth value, a number that is not whole, or text that starts as a number and ends as
            something else (`12x`).
    """
    return _parse(value, base=1024, examples="4096, 64k or 1M")


def parse_count(value: Any) -> Any:
    """Read a number of things that are no tokens, with decimal suffixes: `2k` is 2,000.

    Takes, returns and raises what `parse_tokens` does.
    """
    return _parse(value, base=1000, examples="100, 2k or 1.5M")


def refuse_bool(value: Any) -> Any:
    """Hand a value on unless it is a truth value, which Python would count as 0 or 1.

    Raises:
        ValueError: The value is True or False (YAML reads `yes`, `no`, `on` and `off` so, too).
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is a truth value, not a number")
    return value


def _parse(value: Any, base: int, examples: str) -> Any:
    refuse_bool(value)
    if isinstance(value, float):
        if not math.isfinite(value) or not value.is_integer():
            raise ValueError(f"{value!r} is not a whole number; write one such as {examples}")
        return int(value)
    if not isinstance(value, str) or not _LOOKS_LIKE_A_NUMBER.match(value.strip()):
        return value
    number = _exact(value.strip(), base)
    if number is None:
        raise ValueError(f"{value!r} is not a number; write one such as {examples}")
    if number.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number; write one such as {examples}")
    return int(number)


def _exact(text: str, base: int) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    whole = (match["whole"] or "0").replace(",", "").replace("_", "")
    part = match["part"] if match["part"] not in (None, ".") else ""
    # Fraction and not float: 1.1M must come out whole or not at all, never rounded.
    number = Fraction(f"{match['sign']}{whole}{part}{match['exponent'] or ''}")
    return number * base ** _POWERS[match["suffix"].lower()]
