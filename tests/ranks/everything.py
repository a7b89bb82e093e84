"""All checks under one name, for one spawn. Later names win: rules and tensors call their makers of models what rows calls its checks."""
from ranks.rules import *  # noqa: F403  isort: skip
from ranks.tensors import *  # noqa: F403  isort: skip
from ranks.checkpoints import *  # noqa: F403
from ranks.experts import *  # noqa: F403
from ranks.rows import *  # noqa: F403
from ranks.sequence import *  # noqa: F403
