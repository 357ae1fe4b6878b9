"""pushstep.optim: Adadelta and Adagrad, useful with or without the server.

    from pushstep.optim import Adadelta, Adagrad      # torch's, in one pass over memory

The classes are torch's, with torch's signatures, state and hooks. Their arithmetic lives behind one seam,
`rules`: the server steps its arenas through the same functions, which is why a step taken remotely and a
step taken here give the same bits.

    adadelta, adagrad    the classes: equations, arguments, state
    optimizer            the walk over groups that both share
    rules, kernel_rule   the seam: a rule over tensors that somebody else owns
    dispatch             which path takes a step, and what a backend must offer
    cpu, table           the CPU backend: tensors as tables of addresses
    cpu_rows, rows       row-sparse steps and the merging of duplicates
    cpu_norms, norms     norms in a fixed order
    kernels, row_kernels, norm_kernels, intrinsics    what numba compiles
    kernel_cache, pool   where compiled kernels live; the threads that run them
    eager                the same steps in plain torch operations

`optimizer.path(param)` says which path its next step takes, and why.
"""

from .adadelta import Adadelta as Adadelta
from .adagrad import Adagrad as Adagrad
from .rules import RULES as RULES
from .rules import Rule as Rule

__all__ = ["RULES", "Adadelta", "Adagrad", "Rule"]
