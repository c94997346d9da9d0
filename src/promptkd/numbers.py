"""Numbers as people read them. No torch."""

import math
from collections.abc import Callable


def digits(value: float) -> str:
    """Three significant digits, never an exponent.

    >>> digits(0.0000123456), digits(1.2), digits(-12345.6)
    ('0.0000123', '1.20', '−12346')
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "−")


def like(shown: str, value: float) -> str:
    """With as many decimals as a number that is shown: the ends of an interval beside a mean.

    >>> like("0.0101", 0.00398), like("−0.31", -0.1999), like("0.1", -0.02)
    ('0.0040', '−0.20', '0.0')
    """
    text = f"{value:.{len(shown.partition('.')[2])}f}"
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def plain(value: float) -> str:
    """One decimal, with a minus sign."""
    return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def signed(value: float, written: Callable[[float], str] = plain) -> str:
    """Always with its sign; its size as ``written``.

    >>> signed(1.25), signed(-0.31), signed(0.0), signed(-0.0123, digits)
    ('+1.2', '−0.3', '±0.0', '−0.0123')
    """
    size = written(abs(value))
    sign = "±" if not size.strip("0.") else "+" if value > 0 else "−"
    return f"{sign}{size}"


def count(number: float) -> str:
    """A large number for people: 31,456 or 134.5 M.

    >>> count(31456), count(134_515_008), count(1_310_000_000)
    ('31,456', '134.5 M', '1.31 B')
    """
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    if number >= 1e6:
        return f"{number / 1e6:.1f} M"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes for people.

    >>> size(361_820_000), size(1_450_000_000), size(41_000)
    ('362 MB', '1.45 GB', '41 kB')
    """
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    if number >= 1e6:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """``1 h 04 min``, ``12 min 30 s`` or ``8.1 s``.

    >>> duration(3840), duration(750), duration(8.12)
    ('1 h 04 min', '12 min 30 s', '8.1 s')
    """
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    if seconds >= 60:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds:.1f} s"
