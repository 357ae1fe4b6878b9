"""A safetensors export with state, as a folder of torch.distributed.checkpoint.

The folder holds {"model": {name: tensor}, "optimizer": {"state": {name: ...}, "param_groups": [...]}}. The optimizer's part
has names of parameters instead of numbers, as `torch.distributed.checkpoint.state_dict.set_state_dict` takes it. Nothing is
unpickled on the way.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from pushstep.optim import RULES
from pushstep.optim.state_dict import GroupState, ParameterState, torch_state_dict
from pushstep.proto.wire.tensor_names import GROUPS, STEP, state_name


def write_dcp(export: Path, out: Path) -> None:
    """Write the folder `out`. `export` is a safetensors file that a server has sent, with state."""
    with safe_open(export, framework="pt") as file:
        groups = json.loads(file.metadata()[GROUPS])
    state_dicts = _state_dicts(load_file(export), groups)
    # torch warns that there is no process group: none is needed
    with warnings.catch_warnings(action="ignore"):
        save(state_dicts, storage_writer=FileSystemWriter(out), no_dist=True)


def _state_dicts(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state_dicts of module and optimizer. Removes the states from `tensors`; what is left is the module's."""
    names: list[str] = []
    parts = []
    for group in groups:
        part = GroupState(group["rule"], group)
        for entry in group["params"]:
            name = entry if isinstance(entry, str) else entry[0]
            names.append(name)
            states = RULES[group["rule"]].state_names
            held = {state: tensors.pop(state_name(state, name)) for state in states}
            part.parameters.append(ParameterState(int(tensors.pop(state_name(STEP, name))), held))
        parts.append(part)
    optimizer = torch_state_dict(parts, lambda tensor: tensor)
    return {
        "model": tensors,
        "optimizer": {
            "state": {names[number]: state for number, state in optimizer["state"].items()},
            "param_groups": [
                {**group, "params": [names[number] for number in group["params"]]}
                for group in optimizer["param_groups"]
            ],
        },
    }
