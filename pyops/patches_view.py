"""`terrazzo patches`: a text cut into patches, in colour on the terminal, as a web page, as a picture, as numbers for machines."""
import json
import math
import os
import sys
import warnings
from dataclasses import asdict
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from rich.bar import Bar
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .models.entropy_model import SHIPPED, EntropyModel
from .text_patches import BLOCK, Cut, Rule, measure, starts_of

BORDER = "│"
HISTOGRAM_ROWS = 16  # the last one takes all longer patches
RAMP = ((233, 241, 242), (240, 217, 160), (223, 130, 105))  # entropy 0, SCALE / 2, SCALE: light enough for black letters
SCALE = 4.0          # nats of the deepest colour
PICTURE_ROWS, PICTURE_COLUMNS = 20, 100  # of the text in a PNG
SHOWN = {" ": "·", "\t": "⇥", "\n": "↵", "\x7f": "␡"}


def colour(entropy):
    """#rrggbb of an entropy in nats."""
    place = min(max(entropy / SCALE, 0.0), 1.0) * (len(RAMP) - 1) if math.isfinite(entropy) else 0.0
    low = min(int(place), len(RAMP) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in zip(RAMP[low], RAMP[low + 1]))


def glyphs(patch):
    """What to show for the bytes of a patch, one string a character: nothing invisible, nothing that a terminal obeys.

    A patch may begin or end inside a character: bytes that are no whole character are shown as \\xe2.
    """
    return [_visible(char) for char in patch.decode("utf-8", "backslashreplace")]


def _visible(char):
    if char in SHOWN:
        return SHOWN[char]
    if char < " ":
        return chr(0x2400 + ord(char))  # Unicode's pictures of control characters
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def histogram(lengths):
    """[(words for a length, patches of it)], without gaps; the last row takes the long tail."""
    top = max(lengths)
    if top <= HISTOGRAM_ROWS:
        return [(str(length), lengths.get(length, 0)) for length in range(1, top + 1)]
    tail = sum(count for length, count in lengths.items() if length >= HISTOGRAM_ROWS)
    return [(str(length), lengths.get(length, 0)) for length in range(1, HISTOGRAM_ROWS)] + [(f"{HISTOGRAM_ROWS} and more", tail)]


def lines(facts):
    """[(words, value)] of the statistics, as people read them."""

    def share(value):
        return "–" if value is None else f"{value:.1%}"

    return [
        ("bytes", f"{facts['bytes']}"),
        ("patches", f"{facts['patches']}"),
        ("mean patch length", f"{facts['mean_patch_length']:.2f} bytes"),
        ("median, longest", f"{facts['median_patch_length']}, {facts['longest_patch']} bytes"),
        ("the model needs", f"{facts['bits_per_byte']:.3f} bits per byte"),
        ("mean entropy", f"{facts['mean_entropy']:.3f} nats"),
        ("boundaries at word starts", share(facts["boundaries_at_word_starts"])),
        ("word starts with a boundary", share(facts["word_starts_with_a_boundary"])),
    ]


# ---- terminal ----------------------------------------------------------------------------------------------


def show(console, cut, facts, source, limit):
    if limit:
        text = Text()
        for patch, entropies in cut.patches(limit):
            text.append(BORDER, "dim")
            text.append("".join(glyph + "\n" * (glyph == SHOWN["\n"]) for glyph in glyphs(patch)), Style(color="black", bgcolor=colour(entropies[0])))
        text.append(BORDER, "dim")
        console.print(text, soft_wrap=True)
        if limit < len(cut.text):
            console.print(f"… the first {limit} of {len(cut.text)} bytes (--show)", style="dim", highlight=False)
        if console.color_system and not console.no_color:
            steps = [SCALE * step / 8 for step in range(9)]
            swatches = Text.assemble(*[(f" {step:.1f} ", Style(color="black", bgcolor=colour(step))) for step in steps])
            console.print(Text("colour: entropy of a patch's first byte, nats ").append_text(swatches))
        console.print()
    console.print(f"{source}, cut {cut.rule}", highlight=False, markup=False)
    table = Table(box=SIMPLE, show_header=False, padding=(0, 1, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for row in lines(facts):
        table.add_row(*row)
    console.print(table)
    bars = Table(title="patch lengths", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name, justify in (("bytes", "right"), ("patches", "right"), ("", "left")):
        bars.add_column(name, justify=justify, no_wrap=True)
    rows = histogram(facts["histogram"])
    most = max(count for _, count in rows)
    for length, count in rows:
        bars.add_row(length, str(count), Bar(most, 0, count, width=50))
    console.print(bars)


# ---- files -------------------------------------------------------------------------------------------------


def _need(module, option):
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"terrazzo patches: {option} needs {module} ({error}); pip install terrazzo[patches]") from None


def write_html(path, cut, facts, source):
    """One web page with all of the text, without scripts or network."""
    jinja2 = _need("jinja2", "--html")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("terrazzo").joinpath("templates", "patches.html").read_text("utf-8"))
    rows = histogram(facts["histogram"])
    patches = (
        {"pieces": glyphs(patch), "colour": colour(entropies[0]), "size": len(patch), "entropies": entropies} for patch, entropies in cut.patches()
    )
    legend = [(step, colour(step)) for step in (SCALE * step / 8 for step in range(9))]
    page = template.stream(source=source, rule=str(cut.rule), lines=lines(facts), rows=rows, most=max(count for _, count in rows), patches=patches,
                           legend=legend, newline=SHOWN["\n"])  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        page.dump(file)


def cells(cut):
    """(row, column, width, glyph, entropy of the patch, whether it starts the patch) of what fits into the picture."""
    row = column = 0
    for patch, entropies in cut.patches(PICTURE_ROWS * PICTURE_COLUMNS):
        for place, glyph in enumerate(glyphs(patch)):
            width = cell_len(glyph)
            if column + width > PICTURE_COLUMNS:
                row, column = row + 1, 0
            if row == PICTURE_ROWS:
                return
            yield row, column, width, glyph, entropies[0], place == 0
            row, column = (row + 1, 0) if glyph == SHOWN["\n"] else (row, column + width)


def write_png(path, cut, facts, source):
    """The begin of the text in colour, its entropies byte by byte, and the histogram of patch lengths."""
    _need("matplotlib", "--png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=120, layout="constrained")  # no pyplot: draws with Agg, no window, no global state
    text, curve, bars = figure.subplots(3, 1, height_ratios=(4.2, 1.6, 2))
    figure.suptitle(f"{source}, cut {cut.rule}", x=0.01, ha="left", fontsize=11, parse_math=False)
    _draw_text(text, cut)
    _draw_entropies(curve, cut)
    rows = histogram(facts["histogram"])
    bars.bar([name for name, _ in rows], [count for _, count in rows], color="#1f6f78")
    bars.set_xlabel("bytes of a patch")
    bars.set_ylabel("patches")
    bars.set_title(" · ".join(f"{name}: {value}" for name, value in lines(facts)[:5]), loc="left", fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        figure.savefig(path, format="png")


def _draw_text(axes, cut):
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, PICTURE_COLUMNS), ylim=(PICTURE_ROWS, 0))
    axes.axis("off")
    for row, column, width, glyph, entropy, first in cells(cut):
        axes.add_patch(Rectangle((column, row + 0.06), width, 0.88, facecolor=colour(entropy), linewidth=0))
        if first:
            axes.plot([column, column], [row + 0.06, row + 0.94], color="#222", linewidth=0.8)
        axes.text(column + width / 2, row + 0.5, glyph, ha="center", va="center", family="monospace", fontsize=8.5, parse_math=False)


def _draw_entropies(axes, cut):
    shown = cut.entropies[: 2 * PICTURE_COLUMNS].tolist()
    starts = [start for start in cut.starts if start < len(shown)]
    axes.vlines(starts, 0, max(shown), color="#c9a66b", linewidth=0.6, label="a patch starts")
    axes.plot(shown, color="#1f6f78", linewidth=1, label="entropy of the byte")
    if cut.rule.threshold is not None and not cut.rule.monotonic:
        axes.axhline(cut.rule.threshold, color="#b5654a", linewidth=0.8, linestyle="--", label="threshold")
    axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(0, None), ylabel="nats", xlabel=f"byte (the first {len(shown)})")
    axes.legend(loc="upper right", fontsize=7, ncols=3)


# ---- the command -------------------------------------------------------------------------------------------


def read_text(given, is_text):
    """(words for where it came from, bytes) of FILE, TEXT or - for standard input."""
    if given == "-" and not is_text:
        source, text = "standard input", sys.stdin.buffer.read()
    elif not is_text and os.path.isdir(given):
        raise ValueError(f"terrazzo patches: {given} is a directory; name a file, or say --text")
    elif not is_text and os.path.exists(given):
        source, text = Path(given).name, Path(given).read_bytes()
    else:
        source, text = "the text given", os.fsencode(given)
    if not text:
        raise ValueError(f"terrazzo patches: {source} is empty: there is nothing to cut")
    return source, text


def main(args):
    for option, module in (("html", "jinja2"), ("png", "matplotlib")):
        if getattr(args, option):
            _need(module, f"--{option}")  # before the long work
    if args.show < 0:
        raise ValueError(f"terrazzo patches: --show must not be negative, got {args.show}")
    source, text = read_text(args.source, args.text)
    model = EntropyModel.from_pretrained(args.model)
    rule = Rule(args.mode, args.threshold, args.threshold_add, args.monotonic, args.patch_size, args.max_patch_length).complete(model.config)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=args.json or len(text) <= BLOCK) as progress:
        task = progress.add_task("reading", total=len(text))
        entropies, surprises = measure(model, text, lambda size: progress.advance(task, size))
        cut = Cut(text, entropies, surprises, starts_of(text, entropies, rule), rule)
        facts = cut.statistics()
        for option, write in (("html", write_html), ("png", write_png)):
            if getattr(args, option):
                progress.update(task, description=f"writing {option}")
                write(getattr(args, option), cut, facts, source)
    if args.json:
        report = {"source": source, "model": str(args.model or SHIPPED), "rule": asdict(rule), "statistics": facts, "starts": cut.starts,
                  "lengths": cut.lengths, "entropies": [round(value, 5) for value in entropies.tolist()]}  # fmt: skip
        print(json.dumps(report))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    show(console, cut, facts, source, min(args.show, len(text)))
    for option in ("html", "png"):
        if getattr(args, option):
            console.print(f"written: {getattr(args, option)}", highlight=False, markup=False)
    return 0
