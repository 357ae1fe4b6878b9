"""pushstep.optim: Adadelta and Adagrad, useful with or without the server.

    from pushstep.optim import Adadelta, Adagrad      # torch's, in one pass over memory
    from pushstep.optim import keras, mlx             # the same rules in those libraries' terms

The classes are torch's, with torch's signatures, state and hooks; `conversion` carries state between the three
families. Their arithmetic lives behind one seam, `rule`: the server steps its arenas through the same functions, which is why a step taken remotely and a
step taken here give the same bits.

    adadelta, adagrad    the classes: equations, arguments, state
    optimizer            what all optimizers here share: states, loading, who may step which tensor
    torch_terms          the walk over groups that replaces torch's steps
    rule, rules          the seam: a rule over tensors that somebody else owns
    dispatch             which path takes a step, and what a backend must offer
    cpu, table           the CPU backend: tensors as tables of addresses
    cpu_rows, rows       row-sparse steps and the merging of duplicates
    cpu_norms, norms     norms in a fixed order
    sums                 gradients of several workers added up, with their norms
    cpu_copies, copies   large copies by the same threads
    kernels, *_kernels, intrinsics    what numba compiles
    kernel_cache, pool   where compiled kernels live; the threads that run them
    eager                the same steps in plain torch operations

`optimizer.path(param)` says which path its next step takes, and why.
"""

from . import keras as keras
from . import mlx as mlx
from .adadelta import Adadelta as Adadelta
from .adagrad import Adagrad as Adagrad
from .rule import Rule as Rule
from .rules import RULES as RULES

__all__ = ["RULES", "Adadelta", "Adagrad", "Rule", "keras", "mlx"]
