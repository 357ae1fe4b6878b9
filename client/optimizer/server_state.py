"""`optimizer.state` of an optimizer whose state lies on the server."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

from torch import Tensor


class ServerState(defaultdict[Tensor, Any]):
    """Always empty. Reading a parameter's state raises a KeyError that says where the state is."""

    def __missing__(self, parameter: object) -> NoReturn:
        raise KeyError(
            "the optimizer's state lies on the server: state_dict()['state'] fetches it, by the parameter's number"
        )
