"""A convolution of one's own in terrazzo's benchmark suite, at shapes of one's own:

    python examples/bench_my_kernel.py causal_conv1d --shapes examples/my_shapes.json --provider my_conv,terrazzo,hf

The suite checks it against float64 first, then times it in turns with the others. `terrazzo bench --load` this file does the same.
"""
import torch.nn.functional as F

import terrazzo.bench


@terrazzo.bench.provider("my_conv", op="causal_conv1d")
def my_conv(x, weight, bias):
    """silu(causal convolution) by shifted sums. x (B, D, L), weight (D, W), bias (D,)."""
    L, W = x.shape[-1], weight.shape[-1]
    padded = F.pad(x, (W - 1, 0))
    return F.silu(sum(padded[..., w : w + L] * weight[:, w, None] for w in range(W)) + bias[:, None])


if __name__ == "__main__":
    raise SystemExit(terrazzo.bench.main())
