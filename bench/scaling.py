"""How a training step scales from 8 to 1024 H100s: time floors of compute (bench/cost_model.py) and of what travels, for every plan of parallelism.

A plan is a mesh: `data` rows apart, `context` ranks along a row, `tensor` ranks inside every layer; `experts` ranks share a layer's experts, inside
data x context. FSDP2 shards weights over data x context (experts over what is left of it). The innermost of tensor, experts and context lies within nodes.
Bytes of dispatch, keys, states and halos are terrazzo.distributed.volume's, which tests compare with what ranks send; those of tensor parallelism and FSDP2
are those of ring collectives.

    step = compute + what layers wait for (experts' rows, tensor sums, keys, states) + what FSDP2 cannot hide behind compute

`terrazzo bench scaling -o docs/scaling.md` writes the tables and the plots beside them.
"""
from dataclasses import dataclass, field
from pathlib import Path

from terrazzo import charts
from terrazzo.distributed import volume

from . import causal_conv1d, chunk_scan, linear, moe, rmsnorm_gated
from .cost_model import BF16, H100
from .roofline import Work

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8                     # GPUs that NVLink joins
NVLINK, IB = 450e9, 50e9     # bytes a second and direction, of a GPU: NVLink 4 is 900 GB/s both ways, a 400 Gb/s port of InfiniBand serves each GPU
HOP = 10e-6                  # seconds before a message between two ranks begins to arrive: an assumption
MEMORY = 72e9                # bytes of a GPU's 80 GB for weights and activations
STATE = 16                   # bytes a parameter: bfloat16 weight and gradient, float32 weight and two moments
STOPS = 1.5                  # a doubling of the ranks that gains less is not worth it


# ---- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """`count` layers alike. weights, experts: parameters of one, without its experts and of them alone; work(T, seen, plan, mode): [Work] on T tokens
    of a rank, whose queries see `seen` keys on average; width: numbers that a token needs inside while the layer is computed."""

    count: int
    weights: int
    experts: int
    work: object
    width: int
    wait: object = None  # (T, B, plan) -> {purpose: seconds} that one pass over the layer waits


@dataclass(frozen=True)
class Training:
    """rows of `length` tokens make a step."""

    name: str
    length: int
    rows: int
    D: int
    vocabulary: int
    layers: tuple
    heads: int  # of keys: what tensor parallelism must divide
    experts: int = 0

    @property
    def parameters(self):
        return sum(layer.count * (layer.weights + layer.experts) for layer in self.layers) + 2 * self.vocabulary * self.D


@dataclass(frozen=True)
class Plan:
    data: int = 1
    context: int = 1
    tensor: int = 1
    experts: int = 1
    chunks: int = 1       # of a layer's tokens, one of which travels to its experts while another is computed
    sharded: bool = True  # weights, by FSDP2

    @property
    def ranks(self):
        return self.data * self.context * self.tensor

    def __str__(self):
        names = {"data": self.data, "context": self.context, "tensor": self.tensor, "experts": self.experts, "chunks": self.chunks}
        return ", ".join(f"{name} {size}" for name, size in names.items() if size > 1) or "one rank"


def _attention(T, seen, H, Hk, P, t, mode):
    flops = 4 * T * seen * H * P // t
    return Work(flops * (1 if mode == "fwd" else 3.5), BF16 * T * (2 * H + 2 * Hk) * P // t * (1 if mode == "fwd" else 3))


def _keys(T, B, plan, Hk, P):
    """The last rank's keys come from all others: its node's over NVLink, the others' over its own port."""
    c = plan.context
    if c == 1:
        return {}
    inside = min(c, max(1, NODE // plan.tensor)) - 1
    near, far = (volume.keys(B, Hk // plan.tensor, P, T // B * n, BF16) for n in (inside, c - 1 - inside))
    return {"keys": HOP + max(near / NVLINK, far / IB)}


def _sums(T, D, plan, count=2):
    """Sums of (T, D) over the tensor ranks."""
    t = plan.tensor
    return {"tensor sums": count * (HOP + 2 * (t - 1) / t * T * D * BF16 / NVLINK)} if t > 1 else {}


def bamba(length, rows):
    D, V, MLP, H, P, N, HK, HEADS, AP = 4096, 128256, 14336, 128, 64, 128, 8, 32, 128
    inner, conv = H * P, H * P + 2 * N
    projection = inner + conv + H

    def mlp(T, t, mode):
        return [linear.work(T, D, MLP // t, BF16, mode)] * 2 + [linear.work(T, MLP // t, D, BF16, mode)] + [rmsnorm_gated.work(T, D, BF16, mode)] * 2

    def mamba(T, seen, plan, mode):
        t, summary = plan.tensor, plan.context > 1
        return [linear.work(T, D, projection // t, BF16, mode), causal_conv1d.work(conv // t, T, BF16, mode), chunk_scan.work(T, H // t, P, N, BF16, mode),
                rmsnorm_gated.work(T, inner // t, BF16, mode), linear.work(T, inner // t, D, BF16, mode), *mlp(T, t, mode),
                *([linear.work(N, T, inner // t, BF16, mode)] if summary else [])]  # fmt: skip

    def attention(T, seen, plan, mode):
        t = plan.tensor
        return [linear.work(T, D, (HEADS + 2 * HK) * AP // t, BF16, mode), _attention(T, seen, HEADS, HK, AP, t, mode),
                linear.work(T, D // t, D, BF16, mode), *mlp(T, t, mode)]  # fmt: skip

    def hops(T, B, plan):
        """A state goes from rank to rank; the halo is one hop for all at once."""
        c, found = plan.context, _sums(T, D, plan)
        if c > 1:
            state, inside = volume.states(B, H // plan.tensor, P, N), max(1, NODE // plan.tensor)
            across = (c - 1) // inside
            links = (c - 1) * HOP + (c - 1 - across) * state / NVLINK + across * state / IB
            found["states"] = links + HOP + volume.halo(B, conv // plan.tensor, 4, BF16) / (IB if c > inside else NVLINK)
        return found

    shared = 3 * D * MLP + 2 * D
    layers = (Layer(29, D * projection + inner * D + shared + 5 * conv + 3 * H + inner, 0, mamba, projection + conv + 3 * inner + 3 * MLP + 4 * D, hops),
              Layer(3, 2 * D * D + 2 * D * HK * AP + shared, 0, attention, 4 * D + 3 * MLP + 4 * D, lambda T, B, plan: _sums(T, D, plan) | _keys(T, B, plan, HK, AP)))
    return Training(f"Bamba-9B, rows of {length}", length, rows, D, V, layers, HK)


def dbrx(length, rows):
    D, V, F, E, A, HK, HEADS, P = 6144, 100352, 10752, 16, 4, 8, 48, 128

    def work(T, seen, plan, mode):
        t, e, n = plan.tensor, plan.experts, plan.chunks
        return [linear.work(T, D, (HEADS + 2 * HK) * P // t, BF16, mode), _attention(T, seen, HEADS, HK, P, t, mode), linear.work(T, D // t, D, BF16, mode),
                *[rmsnorm_gated.work(T, D, BF16, mode)] * 2, moe.route_work(T, E, A, BF16),
                *[moe.experts_work(T // n, D, F // t, A, min(E // e, T * A), BF16, mode)] * n]  # fmt: skip

    def wait(T, B, plan):
        e, found = plan.experts, _sums(T, D, plan) | _keys(T, B, plan, HK, P)
        if e > 1:
            inside = min(e, max(1, NODE // plan.tensor))
            near, far = (volume.expert_rows(T * A * n / e, D, BF16) for n in (inside - 1, e - inside))
            counts, travel = volume.expert_counts(E, e, plan.chunks), 2 * max(near / NVLINK, far / IB)
            computed = plan.chunks * H100.floor_us(moe.experts_work(T // plan.chunks, D, F // plan.tensor, A, E // e, BF16))[0] * 1e-6
            hidden = min(travel, computed) * (1 - 1 / plan.chunks)  # all but the first chunk's way there and the last one's back
            found["experts' rows"] = (1 + 2 * plan.chunks) * HOP + counts / (NVLINK if e == inside else IB) + travel - hidden
        return found

    layer = Layer(40, D * (HEADS + 2 * HK) * P + D * D + D * E + 2 * D, 3 * E * D * F, work, A * (3 * F + 2 * D) + 8 * D, wait)
    return Training(f"DBRX, rows of {length}", length, rows, D, V, (layer,), HK, E)


# ---- a step ------------------------------------------------------------------------------------------------------


def collect(size, ranks, inside):
    """Seconds of an all-gather or reduce-scatter of `size` bytes in all over groups of `ranks`, `inside` of them in a node: what enters a GPU over
    NVLink, or what enters a node through their ports, whichever is longer."""
    if ranks == 1:
        return 0.0
    far = size * (1 - inside / ranks) / (inside * IB) if ranks > inside else 0.0
    return HOP + max(size * (ranks - 1) / ranks / NVLINK if inside > 1 else 0.0, far)


@dataclass
class Step:
    """Seconds of a step by what takes them; why is set where it cannot be run."""

    plan: Plan
    seconds: dict = field(default_factory=dict)
    why: str = ""
    useful: float = 0.0  # flops of the model, without what is computed again

    @property
    def total(self):
        return sum(self.seconds.values())

    @property
    def share(self):
        """Useful flops of the peak."""
        return self.useful / (self.plan.ranks * H100.tflops * 1e12 * self.total)


def step(training, plan):
    """The floor of a step: layers are computed again in the backward pass, their inputs alone are kept."""
    sharing = plan.data * plan.context
    if training.rows % plan.data or plan.data > training.rows:
        return Step(plan, why=f"{training.rows} rows cannot be dealt to {plan.data} groups of ranks")
    if training.heads % plan.tensor:
        return Step(plan, why=f"{plan.tensor} ranks don't divide the {training.heads} heads of keys")
    if plan.experts > 1 and (training.experts % plan.experts or sharing % plan.experts):
        return Step(plan, why=f"{plan.experts} ranks don't divide the {training.experts} experts")
    weights = sum(layer.count * layer.weights for layer in training.layers) + 2 * training.vocabulary * training.D
    experts = sum(layer.count * layer.experts for layer in training.layers)
    held = STATE * (weights / plan.tensor / (sharing if plan.sharded else 1) + experts / plan.tensor / (sharing if plan.sharded else plan.experts))
    a_layer = max(layer.weights + layer.experts / plan.experts for layer in training.layers) / plan.tensor
    kept = training.D * sum(layer.count for layer in training.layers) + max(layer.width for layer in training.layers)
    token = BF16 * kept + 10 * training.vocabulary / plan.tensor  # logits and their gradient in float32, and in bfloat16
    stretch, groups = training.length // plan.context, training.rows // plan.data
    free = MEMORY - held - (2 * BF16 * a_layer if plan.sharded else 0)
    if free < token * stretch:
        what = f"{held / 1e9:.0f} GB of weights and optimiser"
        if held <= MEMORY:
            what = f"the activations of {stretch} tokens, {token * stretch / 1e9:.0f} GB, beside {what},"
        return Step(plan, why=f"{what} don't fit a GPU")
    B = max(b for b in range(1, groups + 1) if groups % b == 0 and b * stretch * token <= free)
    return _timed(training, plan, B, groups // B, stretch, sharing)


def _timed(training, plan, B, passes, stretch, sharing):
    """`passes` times forward and backward of B rows at once."""
    T, t = B * stretch, plan.tensor
    seen = training.length - stretch / 2  # on average by the queries of the last rank, which all others wait for
    found, inside = {"compute": 0.0}, max(1, NODE // t)
    useful = 3 * linear.work(T, training.D, training.vocabulary, BF16).flops
    found["compute"] += H100.floor_us(linear.work(T, training.D, training.vocabulary // t, BF16, "bwd"))[0] * 1e-6
    gathered = 3 * collect(BF16 * 2 * training.vocabulary * training.D / t, sharing, min(inside, sharing))
    for layer in training.layers:
        for mode in ("fwd", "bwd"):
            found["compute"] += layer.count * sum(H100.floor_us(work)[0] for work in layer.work(T, seen, plan, mode)) * 1e-6
        useful += layer.count * sum(work.flops for work in layer.work(T, training.length / 2, Plan(), "bwd"))
        for purpose, seconds in (layer.wait(T, B, plan) if layer.wait else {}).items():
            found[purpose] = found.get(purpose, 0.0) + 3 * layer.count * seconds  # forward, again, backward
        if plan.sharded:
            gathered += 3 * layer.count * collect(BF16 * layer.weights / t, sharing, min(inside, sharing))
            others = sharing // plan.experts
            gathered += 3 * layer.count * collect(BF16 * layer.experts / plan.experts / t, others, min(max(1, inside // plan.experts), others))
    if not plan.sharded:  # gradients of what every rank holds are summed once, behind the last pass
        whole = sum(layer.count * layer.weights for layer in training.layers) + 2 * training.vocabulary * training.D
        gathered = 2 * collect(BF16 * whole / t, sharing, min(inside, sharing)) / passes
    found["weights and gradients"] = max(0.0, gathered - found["compute"])
    result = Step(plan, {purpose: passes * seconds for purpose, seconds in found.items()})
    result.useful = passes * useful * sharing
    return result


# ---- plans by name -----------------------------------------------------------------------------------------------


def _powers(top):
    return [2**i for i in range(top.bit_length()) if 2**i <= top]


def kinds(training):
    """{name: f(ranks) -> [Plan]} of which the fastest that fits counts."""
    def split(**inner):
        size = inner.get("context", 1) * inner.get("tensor", 1)
        return lambda ranks: [Plan(ranks // size, **inner)] if ranks % size == 0 and ranks >= size else []

    found = {"data (FSDP2)": split()}
    if training.experts:
        found |= {"experts alone": lambda ranks: [Plan(ranks, experts=ranks, sharded=False)],
                  "experts 8 × data": split(experts=8), "experts 8 × data, 4 chunks": split(experts=8, chunks=4),
                  "experts 16 × data, 4 chunks": lambda ranks: [Plan(ranks, experts=16, chunks=4)] if ranks >= 16 else []}
    found |= {"tensor alone": lambda ranks: [Plan(1, tensor=ranks)], "tensor 8 × data": split(tensor=8)}
    if training.experts:
        return found | {"experts 8 × tensor 2 × data": lambda ranks: [Plan(ranks // 2, tensor=2, experts=8)] if ranks >= 16 else []}
    return found | {
        "context alone": lambda ranks: [Plan(1, context=ranks)],
        "context 8 × data": split(context=8),
        "context × data, best": lambda ranks: [Plan(ranks // c, context=c) for c in _powers(ranks)],
        "tensor 8 × context × data, best": lambda ranks: [Plan(ranks // 8 // c, context=c, tensor=8) for c in _powers(ranks // 8)],
    }


def best(training, plans):
    """The fastest step of the plans, or, where none can be run, one that says why."""
    steps = [step(training, plan) for plan in plans]
    return min((s for s in steps if not s.why), key=lambda s: s.total, default=steps[-1] if steps else None)


def stop(steps):
    """(ranks up to which a plan scales, why not beyond) of {ranks: Step or None}: where the next doubling gains less than STOPS."""
    runs = [ranks for ranks in RANKS if steps[ranks] is not None and not steps[ranks].why]
    if not runs:
        told = next((steps[ranks].why for ranks in RANKS if steps[ranks] is not None), "no such mesh")
        return None, told
    for ranks in runs:
        after = steps.get(2 * ranks)
        if 2 * ranks not in steps:
            return ranks, ""
        if after is None or after.why:
            return ranks, after.why if after else "no such mesh"
        if steps[ranks].total / after.total < STOPS:
            now = steps[ranks].seconds
            grown = {purpose: seconds - now.get(purpose, 0.0) / 2 for purpose, seconds in after.seconds.items()}
            worst = max(grown, key=grown.get)
            return ranks, f"{REASONS[worst]} ({after.seconds[worst] / after.total:.0%} of a step on {2 * ranks})"
    return runs[-1], ""


REASONS = {
    "compute": "tokens a rank become few: products read weights rather than compute, or the last rank's queries see more than the others'",
    "experts' rows": "tokens' way to experts of other nodes",
    "tensor sums": "sums over the tensor ranks, which hold the same tokens",
    "keys": "keys that the last rank of a row waits for",
    "states": "states go from rank to rank, one hop after another",
    "weights and gradients": "FSDP2's weights and gradients take longer than the compute they hide behind",
}
TRAININGS = (dbrx(4096, 1024), bamba(4096, 1024), bamba(262144, 16))


# ---- the document ------------------------------------------------------------------------------------------------

HEAD = f"""# How training scales

Written by `terrazzo bench scaling -o docs/scaling.md`; computed, not measured: nothing here has run on more than one machine. A training step in bfloat16 on
H100s: {NODE} in a node by NVLink ({NVLINK / 1e9:.0f} GB/s a direction), one 400 Gb/s port of InfiniBand for each ({IB / 1e9:.0f} GB/s). Compute is the sum of the
ops' floors ([roofline.md](roofline.md)), so that real steps are longer, by 1.5 to 2.5 where kernels reach 40 to 65 % of the peak, and then hide more.

- **Layers are computed again** in the backward pass; their inputs alone are kept. As many rows go through at once as fit {MEMORY / 1e9:.0f} GB, beside {STATE} bytes a
  parameter (weight, gradient, float32 weight, two moments), logits and one layer's insides.
- **What layers wait for**, three times a layer (forward, again, backward): experts' rows there and back (of several chunks but the first way there and the last
  one back, as far as the experts compute long enough), sums over tensor ranks, keys, states and halos. Bytes are those of
  `terrazzo.distributed.volume`, which tests compare with `traffic()`; a message begins to arrive after {HOP * 1e6:.0f} µs (assumed).
- **FSDP2** gathers weights twice and scatters gradients once for each pass, behind compute; what is longer than compute counts.
- A rank that has a stretch of rows sums it up before it scans it: the product of the summary way, which GPUs take ([distributed.md](distributed.md)).
- Routing is even. In a row that is spread over ranks the last rank's queries see most keys, and all wait for it.

A cell: milliseconds a step, and the model's own flops (nothing computed twice) in percent of all GPUs' peak. A plan **scales** up to where the next doubling of
ranks gains less than {STOPS}×."""

PUBLISHED = """
## What others have published

Other hardware and other models: no row is comparable with the tables above, or with another row.

| what | on | published | source |
|---|---|---|---|
| MegaBlocks, dropless experts, 8-way expert parallel | 8 A100 SXM4 80 GB | time to a given loss 1.38×, 1.37×, 1.18× shorter (MoE-XS, -Small, -Medium) than Tutel with its best capacity factor; 1.8 to 2.4× shorter than dense models by Megatron-LM, which sustain 21 to 48 % of the 2.5 PFLOP/s | Gale et al. (2022), arXiv 2211.15841, section 6 |
| MegaBlocks with FSDP and HSDP of PyTorch | "over three thousand GPUs" | that it scales so far; no step times | PyTorch blog, "Training MoEs at Scale with PyTorch" |
| DeepSpeed-TED: tensor, expert and data parallel, 6.7 B base model × 16 experts (40 B) | 128 V100 | 26 % faster than without its communication optimisations | Singh et al. (2023), arXiv 2303.06318 |
| DeepSpeed-Ulysses: heads and sequence exchanged by all-to-all, 1.2 B GPT, up to 1 M tokens | up to 64 A100 | over 175 TFLOP/s a GPU, over 54 % of the peak; 4 N h / P numbers a link and layer (N tokens, width h, P ranks) | Jacobs et al. (2023), arXiv 2309.14509, and its README |
"""


def _cell(found):
    if found is None:
        return "–"
    if found.why:
        return "✗"
    ms = found.total * 1e3
    return f"{ms:.0f} ({found.share:.0%})" if ms >= 100 else f"{ms:.1f} ({found.share:.0%})"


def _parts(found):
    return ", ".join(f"{purpose} {seconds / found.total:.0%}" for purpose, seconds in found.seconds.items() if seconds >= 0.005 * found.total)


def section(training):
    """(Markdown, the steps of each kind of plan)."""
    every = {name: {ranks: best(training, make(ranks)) for ranks in RANKS} for name, make in kinds(training).items()}
    lines = ["", f"## {training.name} tokens, {training.rows} rows a step", ""]
    lines += [f"{training.parameters / 1e9:.1f} B parameters, {training.rows * training.length / 2**20:.0f} Mi tokens.", ""]
    lines += [f"| plan | {' | '.join(map(str, RANKS))} |", "|---" * (len(RANKS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(steps[ranks]) for ranks in RANKS)} |" for name, steps in every.items()]
    lines += ["", "| plan | scales to | then |", "|---|---|---|"]
    for name, steps in every.items():
        ranks, why = stop(steps)
        lines.append(f"| {name} | {ranks or 'nothing'} | {why or 'nothing here stops it'} |")
    lines += ["", "The fastest:", ""]
    for ranks in RANKS:
        fastest = min((steps[ranks] for steps in every.values() if steps[ranks] and not steps[ranks].why), key=lambda s: s.total, default=None)
        if fastest:
            lines.append(f"- {ranks} ranks: {fastest.plan}: {fastest.total * 1e3:.0f} ms: {_parts(fastest)}")
    return "\n".join(lines), every


def plot(training, every):
    series = [(name, [(ranks, s.total) for ranks, s in steps.items() if s is not None and not s.why]) for name, steps in every.items()]
    return charts.loglog(f"{training.name}: seconds a step", [(name, line) for name, line in series if line], "H100s", "seconds, floor")


def write(path):
    """The document, and its plots beside it; without a path the text alone. Returns the text."""
    texts = [HEAD]
    for training in TRAININGS:
        text, every = section(training)
        name = f"scaling_{training.name.split(',')[0].lower()}_{training.length}.svg"
        texts.append(text + f"\n\n![seconds against ranks]({name})")
        if path:
            (Path(path).parent / name).write_text(plot(training, every))
    text = "\n".join([*texts, PUBLISHED])
    if path:
        Path(path).write_text(text)
    return text
