"""Cases of local_attention: BLT's window of 512 at the shapes of BLT-1B, against torch's attention with a mask."""
import torch
import torch.nn.functional as F

import terrazzo

from .cases import DTYPES, Case, Unavailable, generator, own_providers, peers, trains
from .roofline import Work

# heads, key heads, head width, window, positions
SIZES = {"blt": ((16, 16, 64, 512, (1024, 4096, 8192, 16384, 32768)), (32, 8, 128, 512, (4096,))), "tiny": ((4, 2, 8, 7, (40,)),)}
TRAIN_POSITIONS = (40, 4096, 16384)
MASK_POSITIONS = 16384
REFERENCE_POSITIONS = 2048
CHECKED_POSITIONS = 700  # what the oracle sees: causal, so that later positions change nothing


def _ours(backend, window):
    return lambda q, k, v: terrazzo.local_attention(q, k, v, window, backend=backend)


def _sdpa(window, L):
    """torch's attention with the boolean mask that transformers builds for a sliding window, built once."""
    if L > MASK_POSITIONS:
        raise Unavailable(f"its mask and time grow with the square of {L} positions")
    behind = torch.arange(L)[:, None] - torch.arange(L)  # on torch's default device
    mask = (behind >= 0) & (behind < window)

    def run(q, k, v):
        grouped = q.shape[2] != k.shape[2]
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=grouped).transpose(1, 2)

    return run


def _narrow(inputs, outputs=None):
    if outputs is None:
        return {name: value[:, :CHECKED_POSITIONS].contiguous() for name, value in inputs.items()}
    return tuple(out[:, :CHECKED_POSITIONS] for out in outputs)


def _silence_later_positions(inputs):
    if "grad" not in inputs:
        return inputs
    grad = inputs["grad"].clone()
    grad[:, CHECKED_POSITIONS:] = 0
    return inputs | {"grad": grad}


def work(L, H, Hk, P, window, itemsize, mode="fwd"):
    """Pairs inside the window; q, k, v and y once, with the backward three times."""
    pairs = sum(min(i + 1, window) for i in range(L))
    return Work((4 if mode == "fwd" else 14) * pairs * H * P, itemsize * L * P * (2 * H + 2 * Hk) * (1 if mode == "fwd" else 3))


def cases(preset):
    found = []
    for name, dtype in DTYPES.items():
        for H, Hk, P, window, lengths in SIZES[preset]:
            for L in lengths:
                for mode in ("fwd", *(("bwd",) if trains(preset, L, TRAIN_POSITIONS) else ())):

                    def inputs(seed, L=L, H=H, Hk=Hk, P=P, dtype=dtype, mode=mode):
                        g = generator(seed)
                        heads = {"q": H, "k": Hk, "v": Hk} | ({"grad": H} if mode == "bwd" else {})
                        return {name: torch.randn(1, L, n, P, generator=g).to(dtype) for name, n in heads.items()}

                    why = None if L <= REFERENCE_POSITIONS else f"its scores of all pairs need {4 * H * L * L / 1e9:.0f} GB and more"
                    providers = (*own_providers(lambda backend, window=window: _ours(backend, window), reference=why),
                                 *peers("torch", lambda window=window, L=L: _sdpa(window, L)))
                    found.append(Case("local_attention", f"{L} window {window} {H}/{Hk}x{P}", mode, name,
                                      work(L, H, Hk, P, window, dtype.itemsize, mode), inputs, providers,
                                      lambda window=window: _ours("reference", window), differentiable=("q", "k", "v"), prepare=_silence_later_positions,
                                      narrow=_narrow, arguments={"window": window, "causal": True}))
    return found
