"""Plots as SVG text that follows the page's colours, light or dark: text is currentColor, series k is var(--sk)."""
import math
from html import escape

WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 400, 280, 58, 30, 16, 44
SERIES = 12  # colours; providers beyond share them
STEPS = (1, 2, 5)


def _svg(title, width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
            f'<text x="0" y="15" class="t">{escape(title)}</text>{"".join(parts)}</svg>')  # fmt: skip


def number(value, digits=3):
    """A measured value in few digits, without an exponent as long as people read it so."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def bounds(values, least=6.0):
    """(low, high): an axis a little longer than these positive values, and a factor of `least` long at least: two ticks."""
    low, high = min(values) / 1.2, max(values) * 1.2
    more = max(1.0, least * low / high) ** 0.5
    return low / more, high * more


def ticks(low, high):
    """At most seven numbers of the axis: 1, 2, 5 where it is short, else powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [s * 10.0**p for p in range(first, last + 1) for s in STEPS if low * (1 - 1e-9) <= s * 10.0**p <= high * (1 + 1e-9)]
    if len(marks) > 7:
        marks = [10.0**p for p in range(first, last + 1) if low * (1 - 1e-9) <= 10.0**p <= high * (1 + 1e-9)]
        marks = marks[:: -(-len(marks) // 7)]
    return marks


def _tick(value):
    """A tick's text: 1e-09, 0.05, 2k."""
    if value >= 1e6 or value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def loglog(title, across, up, lines=(), points=(), guides=(), marks=()):
    """Points and lines on logarithmic axes. lines: [(series, [(x, y)])]; points: [(series, x, y, what it is)];
    guides: [(label, what it is, [(x, y)])], dashed, the label at its last point, or none; marks: numbers on the x axis, in place of round ones."""
    data = [(x, y) for _, line in lines for x, y in line] + [(x, y) for _, x, y, _ in points]
    ends = data + [point for *_, line in guides for point in line]
    (x0, x1), (y0, y1) = bounds([x for x, _ in ends], 1.0 if marks else 6.0), bounds([y for _, y in ends])
    wide, high = WIDE - LEFT - RIGHT, HIGH - TOP - BOTTOM

    def at(x, y):
        return LEFT + wide * math.log(x / x0) / math.log(x1 / x0), TOP + high * math.log(y1 / y) / math.log(y1 / y0)

    parts = []
    for value in marks or ticks(x0, x1):
        x, _ = at(value, y0)
        parts.append(f'<path d="M{x:.1f} {TOP}V{TOP + high}" class="g"/><text x="{x:.1f}" y="{TOP + high + 16}" class="m a">{f"{value:g}" if marks else _tick(value)}</text>')
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + wide}" class="g"/><text x="{LEFT - 6}" y="{y + 4:.1f}" class="e a">{_tick(value)}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HIGH - 8}" class="m a">{escape(across)}</text>')
    parts.append(f'<text transform="translate(11 {TOP + high / 2}) rotate(-90)" class="m a">{escape(up)}</text>')
    for label, what, line in guides:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" class="d"><title>{escape(what)}</title></polyline>')
        if label:
            x, y = at(*line[-1])
            parts.append(f'<text x="{x - 4:.1f}" y="{y - 6:.1f}" class="e a">{escape(label)}</text>')
    for series, line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" class="l s{series % SERIES}"/>')
    for series, x, y, what in points:
        px, py = at(x, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" class="p s{series % SERIES}"><title>{escape(what)}</title></circle>')
    return _svg(title, WIDE, HIGH, parts)


def bars(title, entries, unit):
    """Horizontal bars, one scale. entries: [(series, label, value, low, high)]; low to high is a whisker, None for none."""
    label_w = min(190, 12 + 7 * max(len(label) for _, label, *_ in entries))
    plot, bar, gap = WIDE - label_w - 84, 14, 8
    top = max(max(value, high or 0) for _, _, value, _, high in entries) or 1
    parts, y = [], 28
    for series, label, value, low, high in entries:
        parts.append(f'<text x="{label_w - 8}" y="{y + 11}" class="e">{escape(label)}</text>')
        parts.append(f'<rect x="{label_w}" y="{y}" width="{max(plot * value / top, 1.5):.1f}" height="{bar}" rx="2" class="p s{series % SERIES}"/>')
        end = max(value, high or 0)
        if low is not None:
            a, b, middle = label_w + plot * low / top, label_w + plot * high / top, y + bar / 2
            parts.append(f'<path d="M{a:.1f} {middle - 4}v8M{a:.1f} {middle}H{b:.1f}M{b:.1f} {middle - 4}v8" class="w"/>')
        parts.append(f'<text x="{label_w + plot * end / top + 7:.1f}" y="{y + 11}" class="b">{number(value)} {escape(unit)}</text>')
        y += bar + gap
    return _svg(title, WIDE, y + 2, parts)


def ranges(title, entries, mark):
    """A line from least to most and a dot in the middle for each entry, one logarithmic scale. entries: [(label, low, middle, high)].

    mark: (value, label) of a vertical line.
    """
    label_w = min(200, 12 + 7 * max(len(label) for label, *_ in entries))
    plot, row = WIDE - label_w - 58, 22
    x0, x1 = bounds([mark[0], *(value for _, *values in entries for value in values)])
    foot = 28 + row * len(entries)

    def at(value):
        return label_w + plot * math.log(value / x0) / math.log(x1 / x0)

    parts = [f'<path d="M{at(t):.1f} 26V{foot}" class="g"/><text x="{at(t):.1f}" y="{foot + 15}" class="m a">{_tick(t)}</text>' for t in ticks(x0, x1)]
    parts.append(f'<path d="M{at(mark[0]):.1f} 26V{foot}" class="w"/><text x="{at(mark[0]):.1f}" y="{foot + 30}" class="m a">{escape(mark[1])}</text>')
    for i, (label, low, middle, high) in enumerate(entries):
        y = 28 + row * i + row / 2
        parts.append(f'<text x="{label_w - 8}" y="{y + 4}" class="e">{escape(label)}</text><path d="M{at(low):.1f} {y}H{at(high):.1f}" class="r"/>'
                     f'<circle cx="{at(middle):.1f}" cy="{y}" r="5" class="p s0"><title>{escape(label)}: {number(low)} to {number(high)}</title></circle>'
                     f'<text x="{at(high) + 9:.1f}" y="{y + 4}">{number(middle)}</text>')  # fmt: skip
    return _svg(title, WIDE, foot + 36, parts)
