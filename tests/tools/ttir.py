"""Reads Triton's IR (ttir): which addresses come of products that 32 bits may be too few for.

An index times a stride, or a count times a count, may pass 2**31 where neither of the two does; a product with a block's size, or with a
place inside a block, may not, as it stays below a dimension. So no i32 product of two values that the source does not bound may reach an
address, whatever becomes of it on the way: additions, a conversion to i64 (too late), loops. A number that it is compared with or divided by
is another one.
"""
import re

_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_STATEMENT = re.compile(r'(?:(%[\w-]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)?"?(.*)')
_NAME = re.compile(r"%[\w-]+(?:#\d+)?")
_CARRIED = re.compile(r"(%[\w-]+) = (%[\w-]+(?:#\d+)?)")
_NARROW = re.compile(r": (?:tensor<[\dx]+x)?i32>?$")
_STAY_BOUNDED = ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.extsi", "arith.addi", "arith.subi", "arith.muli")
_OTHER_NUMBERS = ("arith.cmpi", "arith.divsi", "arith.remsi", "tt.load", "tt.dot")


class _Graph:
    """Of one kernel: where values move on to, the narrow products, and the offsets of addresses."""

    def __init__(self):
        self.edges, self.bounded, self.products, self.offsets = {}, set(), {}, set()

    def link(self, sources, targets):
        for source, target in zip(sources, targets):
            self.edges.setdefault(source, set()).add(target)

    def reached(self, start):
        seen, waiting = {start}, [start]
        while waiting:
            new = self.edges.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen


def _read(text):
    graph, open_blocks = _Graph(), []  # of each operation that is open: names of its results, and of what its loop carries
    for line in text.splitlines():
        line = _LOCATION.sub("", line).strip()
        if line.startswith("#"):
            continue
        if line.startswith("}"):
            if not line.endswith("{"):  # neither `} else {` nor `} do {`
                open_blocks.pop()
            continue
        result, count, operation, rest = _STATEMENT.match(line).groups()
        operands = _NAME.findall(rest)
        results = [] if not result else [result] if not count else [f"{result}#{i}" for i in range(int(count))]
        if operation in ("arith.constant", "tt.make_range") or (operation in _STAY_BOUNDED and graph.bounded.issuperset(operands)):
            graph.bounded.add(result)
        elif line.startswith("^bb"):
            graph.link(open_blocks[-1][1], operands)
        elif operation in ("scf.yield", "scf.condition"):
            for names in open_blocks[-1]:
                graph.link(operands[operation == "scf.condition":], names)
        elif operation in ("scf.for", "scf.while"):
            pairs = _CARRIED.findall(rest)  # (name inside, first value); a for's own counter comes first and is not carried
            graph.link([value for _, value in pairs], [name for name, _ in pairs])
            carried = [name for name, _ in pairs][operation == "scf.for":]
            graph.link(carried, results)
            open_blocks.append((results, carried))
            continue
        elif operation == "scf.if":
            open_blocks.append((results, []))
            continue
        elif operation not in _OTHER_NUMBERS:
            for name in results:
                graph.link(operands, [name] * len(operands))
        if operation == "arith.muli" and _NARROW.search(rest) and not graph.bounded & set(operands):
            graph.products[result] = line
        elif operation == "tt.addptr":
            graph.offsets.add(operands[1])
        if line.endswith("{"):
            open_blocks.append(([], []))
    return graph


def narrow_offsets(text, indices=()):
    """The i32 products of two values, neither of them bounded, that reach an address: as lines of `text`. `indices` names variables of the
    kernel that a dimension bounds."""
    graph = _read(text)
    return [line for product, line in graph.products.items()
            if re.sub(r"_\d+$", "", product[1:]) not in indices and graph.reached(product) & graph.offsets]
