"""Plots as SVG text that follows the page's colours, light or dark: text is currentColor, series k is var(--ck)."""
import math
from html import escape

WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 440, 300, 66, 28, 14, 42
SERIES = 8  # colours; providers beyond share them


def _svg(title, width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
            f'<text x="{LEFT if height == HIGH else 0}" y="16" class="t">{escape(title)}</text>{"".join(parts)}</svg>')  # fmt: skip


def decades(values):
    """(low, high) powers of ten around positive values, at least one decade apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _tick(power):
    return f"{10.0**power:g}" if -3 <= power <= 4 else f"1e{power}"


def loglog(title, across, up, lines=(), points=(), guides=()):
    """Points and lines on logarithmic axes. lines: [(series, [(x, y)])]; points: [(series, x, y, what it is)]; guides: [(label, [(x, y)])], dashed."""
    data = [(x, y) for _, line in lines for x, y in line] + [(x, y) for _, x, y, _ in points]
    ends = data + [point for _, line in guides for point in line]
    (x0, x1), (y0, y1) = decades([x for x, _ in ends]), decades([y for _, y in ends])
    wide, high = WIDE - LEFT - RIGHT, HIGH - TOP - BOTTOM

    def at(x, y):
        return LEFT + wide * (math.log10(x) - x0) / (x1 - x0), TOP + high * (y1 - math.log10(y)) / (y1 - y0)

    parts = []
    for power in range(x0, x1 + 1, -(-(x1 - x0) // 6)):
        x, _ = at(10.0**power, 10.0**y0)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + high}" class="g"/><text x="{x:.1f}" y="{TOP + high + 16}" class="m">{_tick(power)}</text>')
    for power in range(y0, y1 + 1, -(-(y1 - y0) // 6)):
        _, y = at(10.0**x0, 10.0**power)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + wide}" y2="{y:.1f}" class="g"/><text x="{LEFT - 6}" y="{y + 4:.1f}" class="e">{_tick(power)}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HIGH - 6}" class="m">{escape(across)}</text>')
    parts.append(f'<text transform="translate(12 {TOP + high / 2}) rotate(-90)" class="m">{escape(up)}</text>')
    for label, line in guides:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" class="d"><title>{escape(label)}</title></polyline>')
    for series, line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" class="l s{series % SERIES}"/>')
    for series, x, y, what in points:
        px, py = at(x, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" class="p s{series % SERIES}"><title>{escape(what)}</title></circle>')
    return _svg(title, WIDE, HIGH, parts)


def bars(title, entries, unit):
    """Horizontal bars, one scale. entries: [(series, label, value, low, high)]; low to high is a whisker, None for none."""
    label_w, plot, bar, gap = 130, 210, 16, 6
    top = max(max(value, high or 0) for _, _, value, _, high in entries) or 1
    parts, y = [], 26
    for series, label, value, low, high in entries:
        parts.append(f'<text x="{label_w - 6}" y="{y + 12}" class="e">{escape(label)}</text>')
        parts.append(f'<rect x="{label_w}" y="{y}" width="{max(plot * value / top, 0.5):.1f}" height="{bar}" rx="2" class="p s{series % SERIES}"/>')
        end = max(value, high or 0)
        if low is not None:
            a, b, middle = label_w + plot * low / top, label_w + plot * high / top, y + bar / 2
            parts.append(f'<path d="M{a:.1f} {middle - 4}v8M{a:.1f} {middle}H{b:.1f}M{b:.1f} {middle - 4}v8" class="w"/>')
        parts.append(f'<text x="{label_w + plot * end / top + 6:.1f}" y="{y + 12}" class="b">{value:.3g} {escape(unit)}</text>')
        y += bar + gap
    return _svg(title, WIDE, y + 4, parts)
