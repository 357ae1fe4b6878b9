"""Adadelta and Adagrad in Keras's terms, for torch parameters."""

from .optimizers import Adadelta as Adadelta
from .optimizers import Adagrad as Adagrad

__all__ = ["Adadelta", "Adagrad"]
