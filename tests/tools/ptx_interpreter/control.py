"""Branches, exits, barriers and fences."""
import numpy as np

from .memory import Fault
from .numbers import TYPES
from .parser import Immediate
from .program import Step, Unsupported, instruction


@instruction("bra")
def bra(ins, program):
    target = program.kernel.labels[ins.operands[0].name]
    return Step(ins, None, None, control=lambda wave, place, mask, doing: wave.branch(place, mask, doing, target))


@instruction("ret", "exit")
def ret(ins, program):
    return Step(ins, None, None, control=lambda wave, place, mask, doing: wave.exit(place, mask, doing))


@instruction("bar", "barrier")
def bar(ins, program):
    if ins.has("warp"):
        members = program.source(ins.operands[0], TYPES["u32"])
        return whole_warps(ins, lambda wave, active: None, members)
    if not ins.has("sync") or not isinstance(ins.operands[0], Immediate) or ins.operands[0].value != 0 or len(ins.operands) > 1:
        raise Unsupported("only barrier 0 of the whole block is known")
    return Step(ins, None, None, control=lambda wave, place, mask, doing: wave.wait_at_barrier(place, mask, doing))


def whole_warps(ins, run, members=lambda wave: np.uint32(0xFFFFFFFF)):
    """A step of whole warps, or of the lanes that `members` names."""
    step = Step(ins, None, run, members=members)
    step.control = lambda wave, place, mask, doing: wave.with_whole_warps(place, mask, doing, step)
    return step


@instruction("membar", "fence", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "pmevent")
def nothing(ins, program):
    return lambda wave, active: None


@instruction("trap", "brkpt")
def trap(ins, program):
    def run(wave, active):
        raise Fault("trap")

    return run
