"""pushstep.optim: Adadelta and Adagrad, useful with or without the server.

The classes are torch's, with torch's signatures, state and hooks; `keras` and `mlx` hold the same rules in the terms
of those libraries, and `conversion` carries state between the three. Their arithmetic lives behind one seam,
`rules`: the server steps its arenas through the same functions, which is why a step taken remotely and a
step taken here give the same bits.
"""

from . import keras as keras
from . import mlx as mlx
from .adadelta import Adadelta as Adadelta
from .adagrad import Adagrad as Adagrad
from .rules import RULES as RULES
from .rules import Rule as Rule

__all__ = ["RULES", "Adadelta", "Adagrad", "Rule", "keras", "mlx"]
