"""Drawing with matplotlib: each figure becomes two files and an SVG for the page.

On the page a figure takes its colours from the page's own variables, so one drawing serves light,
dark and print; the files keep the light colours on transparent ground.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from promptkd.files import write_bytes, write_text
from promptkd.numbers import digits

# Okabe and Ito's colours, safe for colour blindness; the page has a lighter set for dark ground.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b0548a", "#a87900", "#5a6b7b")
INK, MUTED, GRID = "#1f2328", "#5c6670", "#d8dce0"
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 3)), "-")
VARIABLES = {
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, start=1)},
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "promptkd",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.3,
}
SIZE = (3.7, 2.45)  # inches; the page shows it at about its natural size, on a phone too
LABEL_GAP = 0.1  # between labels at the ends of lines, in heights of the plot
LONGEST = 18  # characters of such a label
POINTS = 600  # a line with more is averaged in bins before it is drawn


@dataclass(frozen=True)
class Series:
    """One line: ``low`` and ``high`` are its band, ``slot`` picks colour and dash.

    ``marked`` are places whose values are written beside them where the line is alone.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Curves:
    """How lines are drawn.

    Attributes:
        unit: of the values.
        smooth: draw a moving average over 1/20 of the points, the points themselves faintly.
        from_zero: start the axis at zero.
        zero_line: mark zero.
    """

    unit: str
    x_label: str = "step"
    smooth: bool = False
    from_zero: bool = False
    zero_line: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing with the words that go with it.

    Attributes:
        name: of its files.
        title: what is shown.
        message: what it says, for the caption and for those who can't see it.
        svg: for the page.
    """

    name: str
    title: str
    message: str
    svg: str


def lines(
    directory: Path,
    name: str,
    title: str,
    message: str,
    series: Sequence[Series],
    *,
    style: Curves,
) -> Figure:
    """Curves over steps or positions."""

    def draw(axes: Axes) -> None:
        for one in series:
            x, y = np.asarray(one.x, dtype=float), np.asarray(one.y, dtype=float)
            colour, dash = SERIES[one.slot % len(SERIES)], DASHES[one.slot % len(DASHES)]
            if one.low is not None and one.high is not None:
                axes.fill_between(x, one.low, one.high, color=colour, alpha=0.18, linewidth=0)
            bx, by = _binned(x, y)
            if style.smooth and len(x) >= 40:
                axes.plot(bx, by, color=colour, alpha=0.28, linewidth=0.7)
                bx, by = _binned(x, _moving_average(y, max(3, len(y) // 20)))
            axes.plot(bx, by, color=colour, linestyle=dash, label=one.label)
            if len(x) <= 30:
                axes.plot(x, y, linestyle="", marker="o", markersize=2.8, color=colour)
            if len(series) == 1:
                _mark(axes, x, y, one.marked)
        if style.zero_line:
            axes.axhline(0, color=MUTED, linewidth=0.9)
        if style.from_zero or not any(any(one.y) for one in series):
            axes.set_ylim(0, 1.08 * max(max(one.y) for one in series) or 1)
        axes.set_xlabel(style.x_label)
        if len(series) > 1:
            _label_ends(axes, series)
        if all(float(value).is_integer() for one in series for value in one.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    return _figure(directory, name, title, message, style.unit, draw)


def intervals(
    directory: Path,
    name: str,
    title: str,
    message: str,
    rows: Sequence[tuple[str, float, float, float, int]],
    *,
    unit: str,
) -> Figure:
    """One dot with its interval per model: (label, mean, low, high, slot)."""

    def draw(axes: Axes) -> None:
        for place, (_, mean, low, high, slot) in enumerate(rows):
            colour = SERIES[slot] if slot >= 0 else INK
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
            axes.plot([mean], [place], marker="o", markersize=6, color=colour)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if min(low for _, _, low, _, _ in rows) >= 0:
            axes.set_xlim(left=0)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")

    height = 0.75 + 0.27 * len(rows)
    return _figure(directory, name, title, message, unit, draw, height=height)


def stacked_bars(
    directory: Path,
    name: str,
    title: str,
    message: str,
    labels: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    *,
    unit: str,
) -> Figure:
    """One horizontal bar per label, made of named parts."""

    def draw(axes: Axes) -> None:
        left = np.zeros(len(labels))
        for slot, (part, values) in enumerate(parts):
            axes.barh(range(len(labels)), values, 0.6, left, color=SERIES[slot], label=part)
            left += np.asarray(values)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")

    return _figure(
        directory,
        name,
        title,
        message,
        unit,
        draw,
        legend=True,
        height=1.05 + 0.27 * len(labels) + 0.17 * len(parts),
    )


def for_page(svg: str, name: str, message: str) -> str:
    """A standalone SVG made part of a page: its colours, its width, its description, own ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    opening = svg[: svg.index(">")]
    view = re.search(r'viewBox="[^"]+"', opening)
    assert view is not None, "matplotlib always writes a viewBox"
    label = message.translate({ord(c): f"&#{ord(c)};" for c in "&<>\"'"})
    return f'<svg {view[0]} role="img" aria-label="{label}"{svg[svg.index(">") :]}'


def _figure(
    directory: Path,
    name: str,
    title: str,
    message: str,
    unit: str,
    draw: Callable[[Axes], Any],
    *,
    legend: bool = False,
    height: float = SIZE[1],
) -> Figure:
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(SIZE[0], height), layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        axes.set_title(_literal(unit), loc="left", pad=7)
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            columns = 1 if max(map(len, labels)) > 16 else 2
            canvas.legend(
                handles, [_literal(t) for t in labels], loc="outside lower left", ncols=columns
            )
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")  # laid out once, for both files
        drawn, picture = io.StringIO(), io.BytesIO()
        canvas.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        canvas.savefig(picture, format="png", dpi=200, facecolor="white")
    svg = drawn.getvalue()
    write_bytes(directory / f"{name}.png", picture.getvalue())
    write_text(directory / f"{name}.svg", svg)
    return Figure(
        name=name, title=title, message=message, svg=for_page(svg, name, f"{title}. {message}")
    )


def _label_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Name each line where it ends, in its colour, moved apart where lines end together."""
    low, high = axes.get_ylim()
    ends = sorted((((one.y[-1] - low) / (high - low)), place) for place, one in enumerate(series))
    gap = min(LABEL_GAP, 1 / len(ends))
    heights: list[float] = []
    for end, _ in ends:
        heights.append(max(end, heights[-1] + gap) if heights else end)
    over = max(0.0, heights[-1] - 1.0)
    for height, (_, place) in zip(heights, ends, strict=True):
        one = series[place]
        label = one.label if len(one.label) <= LONGEST else f"{one.label[: LONGEST - 1]}…"
        axes.annotate(
            _literal(label),
            (1.02, height - over),
            xycoords="axes fraction",
            va="center",
            color=SERIES[one.slot % len(SERIES)],
        )


def _literal(text: str) -> str:
    """Text that matplotlib doesn't read as mathematics."""
    return text.replace("$", r"\$")


def _mark(axes: Axes, x: np.ndarray, y: np.ndarray, places: Sequence[int]) -> None:
    """Write values beside the line, on the side it doesn't run through."""
    for place in places:
        falls = y[place] < y[place - 1] if place else len(y) > 1 and y[1] < y[0]
        above = falls == (place == 0)
        axes.plot(x[place], y[place], marker="o", markersize=5.5, color=SERIES[0])
        axes.annotate(
            digits(y[place]),
            (x[place], y[place]),
            xytext=(0, 6 if above else -6),
            textcoords="offset points",
            ha="left" if place == 0 else "right" if place == len(x) - 1 else "center",
            va="bottom" if above else "top",
            fontsize=9,
            fontweight="bold",
        )
    if places:
        axes.margins(y=0.2)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the window centred on each point, cut at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - window // 2, 0)
    high = np.minimum(places + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of consecutive ones."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
