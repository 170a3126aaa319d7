"""Numbers as people read them. NaN means "not recorded" and reads as a dash.

A number and its unit are kept on one line by a no-break space, written `SPACE` below.
"""

from __future__ import annotations

import math
import re

SPACE = "\N{NO-BREAK SPACE}"
MISSING = "–"
"""What stands where nothing was recorded."""


def score(value: float) -> str:
    """Return a score such as ROUGE-L or a loss with three decimals: `0.206`."""
    return _or_missing(value, f"{value:.3f}")


def change(before: float, after: float) -> str:
    """Return the signed difference of two scores: `+0.150`, `−0.012`, `±0.000`."""
    difference = after - before
    if round(difference, 3) == 0:
        return "±0.000"
    return _or_missing(difference, f"{difference:+.3f}")


def count(value: float | None) -> str:
    """Return a whole number with thousands separated: `12,345`."""
    return MISSING if value is None else _or_missing(value, f"{value:,.0f}")


def share(value: float) -> str:
    """Return a fraction of 1 as a percentage: `93.0 %`."""
    return _or_missing(value, f"{100 * value:.1f}{SPACE}%")


def byte_size(value: float) -> str:
    """Return bytes in decimal units: `12.3 MB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(value: float) -> str:
    """Return floating-point operations: `4.56 TFLOP`."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def parameters(value: float) -> str:
    """Return a number of parameters: `15.9 M`."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def seconds(value: float) -> str:
    """Return a duration: `0.42 s`, `2 min 30 s`, `1 h 05 min`."""
    if not math.isfinite(value) or value < 9.995:
        return _or_missing(value, f"{value:.2f}{SPACE}s")
    if value < 59.95:
        return f"{value:.1f}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    return f"{minutes // 60:,}{SPACE}h{SPACE}{minutes % 60:02d}{SPACE}min"


def clock(value: float) -> str:
    """Return a duration on the clients' clock, which may be very short: `0.00123 s`, `12.3 s`, `2 min 30 s`."""
    return f"{value:.3g}{SPACE}s" if value < 9.995 else "never" if value == math.inf else seconds(value)


def short(text: str) -> str:
    """Return a figure without decimals that say nothing, as ticks need it: `12.0 MB` as `12 MB`."""
    return re.sub(r"(\.\d*?)0+(?=\s)", lambda match: match[1].rstrip("."), text)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Return `value` with three significant digits and the unit, each a thousand times the one before, that fits it."""
    if not math.isfinite(value):
        return _or_missing(value, "")
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 2)}f}{SPACE}{units[power]}".strip()


def _or_missing(value: float, text: str) -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return text.replace("-", "−")
