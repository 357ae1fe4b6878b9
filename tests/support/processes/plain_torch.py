"""A program for an interpreter that has torch and no pushstep: load a torch export, take one step, save the result.

    python plain_torch.py EXPORT GRADIENTS RESULT RULE...

One rule for an export of one optimizer, or one per optimizer: "adagrad" for the table, "adadelta" for the rest.
"""

import sys
import warnings


class Blocked:
    """Makes pushstep impossible to import, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pushstep":
            raise ImportError("pushstep is not here")


sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402 - not before the block


def main(export: str, gradients: str, result: str, *rules: str) -> None:
    try:
        import pushstep  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("pushstep could be imported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = torch.load(export, weights_only=True)
        network = torch.nn.ModuleDict(
            {
                "table": torch.nn.Embedding(9, 3),
                "hidden": torch.nn.Linear(5, 4),
                "out": torch.nn.Linear(4, 1),
            }
        )
        network.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
        network.load_state_dict(loaded["model"])  # strict: exactly these names and shapes
        # in the order of the export, which is the order in which the optimizer knows them
        parameters = dict(network.named_parameters())
        ordered = [parameters[name] for name in loaded["model"]]
        shares = [ordered] if len(rules) == 1 else [ordered[:1], ordered[1:]]
        states = [loaded["optimizer"]] if len(rules) == 1 else loaded["optimizer"]
        kinds = {"adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad}
        optimizers = [kinds[rule](share) for rule, share in zip(rules, shares, strict=True)]
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    for name, gradient in torch.load(gradients, weights_only=True).items():
        parameters[name].grad = gradient
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        for optimizer in optimizers:
            optimizer.step()
    torch.save(
        {
            "loaded": loaded["model"],
            "model": {name: parameter.detach() for name, parameter in parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        },
        result,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
