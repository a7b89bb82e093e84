"""All checks under one name, for one spawn."""
from ranks.experts import *  # noqa: F403
from ranks.checkpoints import *  # noqa: F403
from ranks.rows import *  # noqa: F403
from ranks.rules import *  # noqa: F403
from ranks.sequence import *  # noqa: F403
from ranks.tensors import *  # noqa: F403
