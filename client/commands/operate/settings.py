"""`pushstep policy`, `gate` and `durability`: one model's settings of a kind, shown and changed."""

from __future__ import annotations

from collections.abc import Callable

from ..door import Door, DryRunOption, ModelArgument, SetOption, Table, leaves, operates, pairs


def _settings(resource: str, what: str, example: str) -> Callable[..., None]:
    def command(
        door: Door, model: ModelArgument, values: SetOption = None, dry_run: DryRunOption = False
    ) -> None:
        from ..rest import model_path

        path = model_path(model, resource)
        if values:
            answer = door.ask("PATCH", path, pairs(values), dry_run=dry_run)
            door.show_edit(answer, f"{resource} of {model}: {', '.join(values)}", dry_run=dry_run)
        else:
            shown = door.ask("GET", path)
            door.show(shown, Table(("", resource), leaves(shown)))

    command.__name__ = resource
    command.__doc__ = f"Show or change {what}: `pushstep {resource} flights --set {example}`."
    return operates(command)


policy = _settings("policy", "when pushes are applied", "policy=sync")
gate = _settings("gate", "which pushes are let in", "nonfinite=skip")
durability = _settings("durability", "how a model is kept on the disk", "level=durable")
