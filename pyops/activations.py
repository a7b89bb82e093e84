"""The activations of linear layers and experts by name, Hugging Face's names included."""
from . import checks

# name -> number in the native ops (Activation in csrc/common/params.h)
IDS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5, "swiglu_oai": 6}
ALIASES = {"none": None, "linear": None, "swish": "silu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
           "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu_squared": "relu2"}  # fmt: skip


def resolve(fn, activation, gates=True):
    """The canonical name of an activation; gates=False leaves out those that take a gate and an up projection."""
    name = ALIASES.get(activation, activation) if activation is None or isinstance(activation, str) else activation
    known = [n for n in IDS if gates or n != "swiglu_oai"]
    if name not in known:
        names = ", ".join(repr(n) for n in known)
        checks.fail(fn, f"activation must be one of {names}, or transformers' name of one of these, got {activation!r}; "
                        "apply another one outside the op")
    return name
