"""Bytes that a rank sends to others, by the purposes of `traffic`: tests hold `traffic` to them, and `terrazzo bench scaling` makes times of them.

Forward; the backward pass sends as much, the other way. What FSDP2 and tensor parallelism send is torch's.
"""


def expert_counts(E, ranks, chunks=1):
    """A layer's rows for every expert, int32: sent forward only."""
    return 4 * chunks * (ranks - 1) * E // ranks


def expert_rows(rows, D, itemsize):
    """"expert dispatch" of a layer whose routing sends `rows` pairs (token, choice) to experts of other ranks. "expert combine" sends back as many as came."""
    return rows * D * itemsize


def halo(B, D, W, itemsize):
    """Of a convolution, to the rank on the right."""
    return B * D * (W - 1) * itemsize


def states(B, H, P, N):
    """Of a scan, to the rank on the right, float32."""
    return 4 * B * H * P * N


def packed(B):
    """What a convolution or a scan of packed texts sends more, forward only: the last position's text, int32."""
    return 4 * B


def keys(B, Hk, P, seen, itemsize):
    """Keys and values of an attention layer; seen: positions here that are seen on another rank, summed over the ranks on the right."""
    return 2 * B * Hk * P * seen * itemsize
