"""pushstep.optim: Adadelta and Adagrad as a library of their own; it needs no server.

    from pushstep.optim import Adadelta, Adagrad      # torch's, in one pass over memory
    from pushstep.optim import keras, mlx             # the same rules in those libraries' terms

The classes are torch's, with torch's signatures, state and hooks. `conversion` carries state between the three
families. The arithmetic is behind one interface, `rules/`. The server steps its arenas through the same functions, so a
remote step and a local step give the same bits.

    optimizers/    the classes: arguments, states, the walk over groups that replaces torch's steps
    keras/, mlx    the same in those libraries' terms
    rules/         the update rules: the equations, over tensors that the caller owns
    step/          one step described, and whether its tensors fit each other
    backends/      which path takes a step; the same steps in plain torch operations
    cpu/, cuda/    the backends that have kernels
    kernels/       what numba compiles, and where it is kept
    ops/           norms, sums, copies, int8 codes, selections, digests

`optimizer.path(param)` returns the path that the parameter's next step takes, and the reason.
"""

from . import keras as keras
from . import mlx as mlx
from .optimizers.adadelta import Adadelta as Adadelta
from .optimizers.adagrad import Adagrad as Adagrad
from .rules.catalogue import RULES as RULES
from .rules.rule import Rule as Rule

__all__ = ["RULES", "Adadelta", "Adagrad", "Rule", "keras", "mlx"]
