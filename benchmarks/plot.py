"""Line charts side by side as one SVG, from numbers alone: the same numbers give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 430, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 62, 52
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_LIGHT = ("#0b62d6", "#b3470a", "#1a7f37", "#8250df")
_DARK = ("#6cb2ff", "#ff9d4d", "#56d364", "#d2a8ff")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
"""Series differ in their dashes and marks, too, for those who do not see the colours."""


@dataclass(frozen=True, slots=True)
class Series:
    """`points` are (x, y); `labels` say what each is when pointed at."""

    name: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart, both axes from 0; labels name the units."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]


def svg(panels: Sequence[Panel], title: str) -> str:
    """The charts on a background of their own, so that they can be read on any page, in light and dark mode."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="page" width="{width}" height="{HEIGHT}" rx="6"/>',
    ]
    for index, panel in enumerate(panels):
        parts += [f'<g transform="translate({index * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join((*parts, "</svg>")) + "\n"


def ticks(largest: float, most: int = 6) -> list[float]:
    """0 and steps of 1, 2 or 5 times a power of ten, up to the first that is not below `largest`."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / most))
    step = next(step for factor in (1, 2, 5, 10, 20) if largest / (step := factor * power) <= most)
    return [step * index for index in range(math.ceil(largest / step - 1e-9) + 1)]


def _style() -> str:
    rules = [
        "text{font:12px system-ui,sans-serif}",
        ".page{fill:#ffffff}",
        "text{fill:#1f2328}",
        ".grid{stroke:#d1d9e0}",
        ".axis{stroke:#59636e}",
        ".line{fill:none;stroke-width:2}",
    ]
    dark = [".page{fill:#0d1117}", "text{fill:#f0f6fc}", ".grid{stroke:#3d444d}", ".axis{stroke:#9198a1}"]
    for index, (light, other) in enumerate(zip(_LIGHT, _DARK, strict=True)):
        rules += [f".s{index}{{stroke:{light}}}", f".m{index}{{fill:{light}}}"]
        dark += [f".s{index}{{stroke:{other}}}", f".m{index}{{fill:{other}}}"]
    return "".join(rules) + "@media (prefers-color-scheme:dark){" + "".join(dark) + "}"


def _panel(panel: Panel) -> list[str]:
    points = [point for series in panel.series for point in series.points]
    x_ticks, y_ticks = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))
    middle = LEFT + _PLOT_WIDTH / 2
    parts = [
        _text(middle, 20, panel.title, "middle", "font-weight:600"),
        *_legend(panel.series),
        *_axes(x_ticks, y_ticks),
        _text(middle, HEIGHT - 12, panel.x_label, "middle"),
        f'<text transform="translate(16 {TOP + _PLOT_HEIGHT / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y_label)}</text>",
    ]
    for index, series in enumerate(panel.series):
        parts += _line(index % len(_LIGHT), series, x_ticks[-1], y_ticks[-1])
    return parts


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = _y(value, y_ticks[-1])
        kind = "grid" if value else "axis"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", "end"))
    for value in x_ticks:
        x, bottom = _x(value, x_ticks[-1]), HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 17, f"{value:g}", "middle"))
    return parts


def _legend(series: Sequence[Series]) -> list[str]:
    parts, space = [], _PLOT_WIDTH / len(series)
    for index, one in enumerate(series):
        x, style = LEFT + index * space, index % len(_LIGHT)
        parts.append(
            f'<line class="line s{style}" stroke-dasharray="{_DASHES[style]}" x1="{x:.1f}" x2="{x + 26:.1f}" '
            f'y1="41" y2="41"/>'
        )
        parts += [_mark(style, x + 13, 41, ""), _text(x + 32, 45, one.name, "start")]
    return parts


def _line(style: int, series: Series, x_most: float, y_most: float) -> list[str]:
    places = [(_x(x, x_most), _y(y, y_most)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = [_mark(style, x, y, label) for (x, y), label in zip(places, series.labels, strict=True)]
    return [f'<polyline class="line s{style}" stroke-dasharray="{_DASHES[style]}" points="{path}"/>', *marks]


def _mark(style: int, x: float, y: float, label: str) -> str:
    """A circle, a square, a triangle or a diamond."""
    title = f"<title>{escape(label)}</title>" if label else ""
    if style == 0:
        return f'<circle class="m0" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
    corners = ((-4, -4, 4, -4, 4, 4, -4, 4), (0, -5, 5, 4, -5, 4), (0, -6, 6, 0, 0, 6, -6, 0))[style - 1]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in zip(corners[::2], corners[1::2], strict=True))
    return f'<polygon class="m{style}" points="{path}">{title}</polygon>'


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    extra = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def _x(value: float, most: float) -> float:
    return LEFT + value / most * _PLOT_WIDTH


def _y(value: float, most: float) -> float:
    return TOP + (1 - value / most) * _PLOT_HEIGHT
