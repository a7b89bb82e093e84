"""What ranks tell each other: row exchanges and neighbours' messages that can be differentiated, the bytes they take, and errors that say who failed."""
import hashlib
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import checks

_sent = Counter()
_threads = WeakKeyDictionary()  # group -> see Line.threads


def traffic():
    """Bytes of payload that this rank has sent to other ranks by `terrazzo.distributed` since `reset_traffic`, for each purpose; forward and backward."""
    return dict(_sent)


def reset_traffic():
    """Starts `traffic` at nothing."""
    _sent.clear()


def check_mesh(fn, mesh):
    """(group, this rank's place in it, its size) of a mesh of one dimension that this rank belongs to."""
    if not isinstance(mesh, dist.DeviceMesh):
        checks.fail(fn, f"mesh must be a DeviceMesh of one dimension, got {type(mesh).__name__}; make one by torch.distributed.init_device_mesh", TypeError)
    if mesh.ndim != 1:
        checks.fail(fn, f"mesh must have one dimension, got {mesh.ndim} {mesh.mesh_dim_names or ''}; name one of them: mesh['name']")
    if mesh.get_coordinate() is None:
        checks.fail(fn, f"this rank, {dist.get_rank()}, must belong to the mesh, got ranks {mesh.mesh.tolist()}")
    return mesh.get_group(), mesh.get_local_rank(), mesh.size()


def claim(fn, model, mesh):
    """Notes that the ranks of mesh share this model's work by the plan `fn`."""
    model._ranks_of_plans = getattr(model, "_ranks_of_plans", {}) | {fn: mesh.mesh.tolist()}


def check_claims(fn, model, mesh):
    """Ranks that share a model's work by one plan can't share it by another too."""
    for plan, ranks in getattr(model, "_ranks_of_plans", {}).items():
        if len(set(ranks) & set(mesh.mesh.tolist())) > 1:
            checks.fail(fn, f"mesh must cross that of {plan}, ranks {ranks}, got ranks {mesh.mesh.tolist()}; take another dimension of one mesh")


@contextmanager
def explained(what, group):
    """Errors of torch.distributed inside say what failed, and between whom."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"terrazzo.distributed: {what} between ranks {ranks} failed on rank {dist.get_rank()}: another rank died, raised an error or never came to this "
            f"call; its own output says why. {error}"
        ) from error


def _count(purpose, tensor, rows=None):
    """Counts a message: the tensor, or `rows` of its rows."""
    _sent[purpose] += tensor.element_size() * (tensor.numel() if rows is None else rows * math.prod(tensor.shape[1:]))


def agree(fn, group, model, check, **arguments):
    """check() raises what this rank sees alone. Then, on every rank alike, raises that, or that the ranks differ in it, in their models or in `arguments`:
    a rank that raised alone, or went on with another model, would let the others wait for it."""
    try:
        check()
        wrong = None
    except (TypeError, ValueError) as error:
        wrong = error
    mine = [*_described(model), *(f"{name} {value}" for name, value in arguments.items()), *([] if wrong is None else [str(wrong)])]
    everyones = [None] * dist.get_world_size(group)
    with explained("comparing the ranks' models", group):
        dist.all_gather_object(everyones, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    for rank, theirs in zip(ranks, everyones):
        for one, other in zip_longest(everyones[0], theirs, fillvalue="nothing more"):
            if one != other:
                checks.fail(fn, f"every rank must pass the same model and arguments, got {one} on rank {ranks[0]} and {other} on rank {rank}")
    if wrong is not None:
        raise wrong


def _described(model):
    """A line for the class, each setting, and each parameter and buffer: name, shape, dtype and, of plain tensors, a hash of some values."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else vars(config) if is_dataclass(config) else {}
    lines = [f"{type(model).__module__}.{type(model).__qualname__}", *(f"{name} {value}" for name, value in settings.items() if not name.startswith("_"))]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()) if isinstance(model, torch.nn.Module) else ():
        tensor, values = tensor.detach(), ""
        if type(tensor) is torch.Tensor and not tensor.is_meta:
            some = tensor.flatten()[:: max(1, tensor.numel() // 64)].cpu().contiguous()
            values = " " + hashlib.sha1(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
        lines.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}{values}")
    return lines


# ---- rows to every rank and back ---------------------------------------------------------------------------------


class Exchange:
    """send[i] rows go to rank i of the group, receive[i] rows come from it. `start` begins, `finish` waits: what lies between runs meanwhile, in the
    backward pass too, where the gradients travel the other way."""

    def __init__(self, group, place, send, receive, purpose):
        self.group, self.place, self.send, self.receive, self.purpose = group, place, send, receive, purpose
        self.open = None  # (work, received, sent) of the transfer in flight

    def begin(self, rows, back=False):
        outgoing, incoming = (self.receive, self.send) if back else (self.send, self.receive)
        rows = rows.contiguous()
        received = rows.new_empty(sum(incoming), *rows.shape[1:])
        _count(self.purpose, rows, sum(outgoing) - outgoing[self.place])
        with explained(self.purpose, self.group):
            work = dist.all_to_all_single(received, rows, incoming, outgoing, group=self.group, async_op=True)
        self.open = work, received, rows
        return received

    def end(self):
        (work, received, _), self.open = self.open, None
        with explained(self.purpose, self.group):
            work.wait()
        return received

    def start(self, rows):
        """The buffer that `finish` fills."""
        return _Start.apply(rows, self)

    def finish(self, buffer):
        return _Finish.apply(buffer, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        return exchange.begin(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.exchange.end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, exchange):
        ctx.exchange = exchange
        return exchange.end()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.exchange.begin(grad, back=True)  # _Start's backward, which runs later, waits for it and returns what came
        return grad, None


# ---- neighbours --------------------------------------------------------------------------------------------------


class Line:
    """The ranks of a group in the order of their parts of the sequence."""

    def __init__(self, group, place, size, purpose):
        self.group, self.place, self.size, self.purpose = group, place, size, purpose

    def shift(self, tensor, step, received=None):
        """Sends `tensor` (None: nothing) to the neighbour `step` places on, and fills `received` (None: nothing) from the one `step` places before.
        A neighbour that isn't there is left out: `received` then stays as it is."""
        to, source = self.place + step, self.place - step
        outgoing = {to: tensor} if tensor is not None and 0 <= to < self.size else {}
        incoming = {source: received} if received is not None and 0 <= source < self.size else {}
        self.transfer(outgoing, incoming)
        return received

    def transfer(self, outgoing, incoming):
        """Sends each tensor of outgoing {place: tensor} and fills those of incoming {place: tensor}, all at once; nothing happens where both are empty."""
        ops = []
        for place, tensor in outgoing.items():
            _count(self.purpose, tensor)
            ops.append(dist.P2POp(dist.isend, tensor.contiguous(), group=self.group, group_peer=place))
        ops += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=place) for place, tensor in incoming.items()]
        with explained(self.purpose, self.group):
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()

    def threads(self):
        """The most threads of a CPU that a rank has, asked once for each group: what ranks decide by it they decide alike."""
        if self.group not in _threads:
            counts = Line(self.group, self.place, self.size, "numbers of threads").numbers([torch.get_num_threads()], "cpu")
            _threads[self.group] = max(count for (count,) in counts)
        return _threads[self.group]

    def numbers(self, mine, device):
        """Every rank's list of as many integers."""
        mine = torch.tensor(mine, device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        _count(self.purpose, mine, (self.size - 1) * len(mine))
        with explained(self.purpose, self.group):
            dist.all_gather(found, mine, group=self.group)
        return torch.stack(found).tolist()

    def everyones(self, tensor, lengths):
        """(1, n) of each rank, n of them in `lengths` -> (1, sum of lengths)."""
        piece = torch.nn.functional.pad(tensor, (0, max(lengths) - tensor.shape[1]))
        found = [torch.empty_like(piece) for _ in range(self.size)]
        _count(self.purpose, piece, self.size - 1)
        with explained(self.purpose, self.group):
            dist.all_gather(found, piece.contiguous(), group=self.group)
        return torch.cat([part[:, :n] for part, n in zip(found, lengths)], 1)

    def total(self, value):
        """The sum of every rank's scalar, without gradient."""
        value = value.detach().clone()
        _count(self.purpose, value, self.size - 1)
        with explained(self.purpose, self.group):
            dist.all_reduce(value, group=self.group)
        return value


class Relay:
    """Parts of a message that go along a Line by `step` places one after another, while the ranks compute others. parts: buffers of what comes, as many and
    as large on every rank; they are open from the start, so that no part waits to be asked for."""

    def __init__(self, line, step, parts):
        self.line, self.to, self.sent, self.coming = line, line.place + step, [], []
        self.tag = len(parts)  # ranks that cut a message differently wait for each other in vain rather than mix it up
        source = line.place - step
        if 0 <= source < line.size:
            with explained(line.purpose, line.group):
                self.coming = [(part, dist.irecv(part, group=line.group, group_src=source, tag=self.tag)) for part in parts]

    def take(self):
        """The next part of the neighbour `step` places before, None without one."""
        if not self.coming:
            return None
        part, work = self.coming.pop(0)
        with explained(self.line.purpose, self.line.group):
            work.wait()
        return part

    def give(self, part):
        """Sends the next part on, if there is a neighbour; `end` waits until all have left."""
        if 0 <= self.to < self.line.size:
            _count(self.line.purpose, part)
            with explained(self.line.purpose, self.line.group):
                self.sent.append((part, dist.isend(part, group=self.line.group, group_dst=self.to, tag=self.tag)))

    def end(self):
        with explained(self.line.purpose, self.line.group):
            for _, work in self.sent:
                work.wait()
