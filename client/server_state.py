"""What `optimizer.state` is where the state lies on the server."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

from torch import Tensor


class ServerState(defaultdict[Tensor, Any]):
    """Empty: whoever asks for a parameter's state is told where it is."""

    def __missing__(self, parameter: object) -> NoReturn:
        raise KeyError(
            "the optimizer's state lies on the server: state_dict()['state'] fetches it, by the parameter's number"
        )
