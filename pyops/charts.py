"""Small charts as SVG text, for the demo, the benchmark report and the trainers: no drawing library needed."""
import math
from html import escape

COLOURS = ("#1f6f78", "#c9a66b", "#7b8fa1", "#b5654a", "#5b8c5a")
LABEL, PLOT, VALUE = 190, 420, 110  # widths of the three columns
BAR, GAP, HEAD = 20, 6, 26
FONT = 'font-family="system-ui, sans-serif" fill="#222"'
TEXT = f'{FONT} font-size="13"'


def bars(title, groups, unit=""):
    """SVG of horizontal bars. groups: [(heading, [(label, value[, low, high])])]; low to high is a whisker.

    Bars of one group share a scale; groups do not, since their units need not be the same size.
    """
    parts, y = [], 34
    for heading, entries in groups:
        parts.append(f'<text x="12" y="{y + 12}" {TEXT} font-weight="600">{escape(heading)}</text>')
        y += HEAD
        top = max((max(entry[1:]) for entry in entries), default=0) or 1
        for index, (label, value, *whisker) in enumerate(entries):
            width = PLOT * value / top
            colour = COLOURS[index % len(COLOURS)]
            parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" {TEXT} text-anchor="end">{escape(label)}</text>')
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>')
            end = width
            if whisker:
                low, high = (PLOT * edge / top for edge in whisker)
                end = max(end, high)
                middle = y + BAR / 2
                parts.append(f'<line x1="{LABEL + low:.1f}" y1="{middle}" x2="{LABEL + high:.1f}" y2="{middle}" stroke="#222"/>')
            parts.append(f'<text x="{LABEL + end + 8:.1f}" y="{y + 15}" {TEXT}>{escape(f"{value:.4g} {unit}".rstrip())}</text>')
            y += BAR + GAP
        y += GAP
    return _svg(title, LABEL + PLOT + VALUE, y + 8, parts)


def curves(title, series, across, up, levels=()):
    """SVG of lines. series: [(label, [(x, y)])]; across, up: what the axes say; levels: [(label, y)], drawn as dashed lines."""
    left, top, wide, high = 64, 40, 600, 300
    points = [point for _, line in series for point in line]
    right = max((x for x, _ in points), default=0) or 1
    values = sorted([y for _, y in points] + [y for _, y in levels]) or [0, 1]
    low, peak = min(values), max(values)
    step = _tick(peak - low or 1)
    low, peak = math.floor(low / step) * step, math.ceil(peak / step + 1e-9) * step

    def at(x, y):
        return f"{left + wide * x / right:.1f},{top + high * (peak - y) / (peak - low):.1f}"

    parts = []
    for i in range(round((peak - low) / step) + 1):
        y = top + high * (1 - i * step / (peak - low))
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" {TEXT} text-anchor="end">{low + i * step:.4g}</text>')
    for i in range(math.floor(right / _tick(right)) + 1):
        x = left + wide * i * _tick(right) / right
        parts.append(f'<text x="{x:.1f}" y="{top + high + 18}" {TEXT} text-anchor="middle">{i * _tick(right):.4g}</text>')
    text = -math.inf  # where the last label stands: they keep their distance
    for label, y in sorted(levels, key=lambda level: -level[1]):
        edge = float(at(right, y).split(",")[1])
        text = max(edge + 4, text + 15)
        parts.append(f'<line x1="{left}" y1="{edge}" x2="{left + wide}" y2="{edge}" stroke="#222" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{left + wide + 8}" y="{text:.1f}" {TEXT}>{escape(f"{label} {y:.3g}")}</text>')
    for index, (label, line) in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{" ".join(at(x, y) for x, y in line)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{left + 12}" y="{top + 18 + 18 * index}" {FONT.replace("#222", colour)} font-size="13">{escape(label)}</text>')
    parts.append(f'<text x="{left + wide / 2}" y="{top + high + 38}" {TEXT} text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text transform="translate(16 {top + high / 2}) rotate(-90)" {TEXT} text-anchor="middle">{escape(up)}</text>')
    return _svg(title, left + wide + VALUE, top + high + 48, parts)


def loglog(title, series, across, up):
    """SVG of lines on logarithmic axes: powers of two across, powers of ten up. series: [(label, [(x, y)])], all positive."""
    left, top, wide, high, names = 64, 40, 520, 320, 240
    xs, ys = zip(*(point for _, line in series for point in line))
    x0, x1 = math.floor(math.log2(min(xs))), max(math.ceil(math.log2(max(xs))), math.floor(math.log2(min(xs))) + 1)
    y0, y1 = math.floor(math.log10(min(ys))), max(math.ceil(math.log10(max(ys))), math.floor(math.log10(min(ys))) + 1)

    def at(x, y):
        return left + wide * (math.log2(x) - x0) / (x1 - x0), top + high * (y1 - math.log10(y)) / (y1 - y0)

    parts = []
    for power in range(x0, x1 + 1):
        x, _ = at(2.0**power, 10.0**y0)
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + high}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + high + 18}" {TEXT} text-anchor="middle">{2**power:g}</text>')
    for power in range(y0, y1 + 1):
        _, y = at(2.0**x0, 10.0**power)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" {TEXT} text-anchor="end">{10.0**power:g}</text>')
    for index, (label, line) in enumerate(series):
        colour, dashes = COLOURS[index % len(COLOURS)], ' stroke-dasharray="6 4"' if index >= len(COLOURS) else ""
        points = [at(x, y) for x, y in line]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        y = top + 18 + 20 * index
        parts.append(f'<line x1="{left + wide + 16}" y1="{y - 4}" x2="{left + wide + 40}" y2="{y - 4}" stroke="{colour}" stroke-width="1.6"{dashes}/>')
        parts.append(f'<text x="{left + wide + 46}" y="{y}" {TEXT}>{escape(label)}</text>')
    parts.append(f'<text x="{left + wide / 2}" y="{top + high + 38}" {TEXT} text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text transform="translate(16 {top + high / 2}) rotate(-90)" {TEXT} text-anchor="middle">{escape(up)}</text>')
    return _svg(title, left + wide + names, top + high + 48, parts)


def _tick(span):
    """The round number of which `span` holds four to ten."""
    unit = 10.0 ** math.floor(math.log10(span))
    return next(unit * part for part in (0.1, 0.2, 0.25, 0.5, 1) if span / (unit * part) <= 10)


def _svg(title, width, height, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
    ground = f'<title>{escape(title)}</title><rect width="{width}" height="{height}" fill="white"/>'
    name = f'<text x="12" y="22" {FONT} font-size="16" font-weight="600">{escape(title)}</text>'
    return "\n".join([head, ground, name, *parts, "</svg>", ""])
