"""Small bar charts as SVG text, for the demo and the benchmark report: no drawing library needed."""
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
    width, height = LABEL + PLOT + VALUE, y + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
    ground = f'<title>{escape(title)}</title><rect width="{width}" height="{height}" fill="white"/>'
    name = f'<text x="12" y="22" {FONT} font-size="16" font-weight="600">{escape(title)}</text>'
    return "\n".join([head, ground, name, *parts, "</svg>", ""])
