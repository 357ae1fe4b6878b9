"""One model: what its rooms hold together."""

from __future__ import annotations

import asyncio
import json

from judged import LAYOUT

from pushstep.proto.errors import NonfiniteGradient
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt
from pushstep.server.device import Device
from pushstep.server.groups import Group, ParamGroups
from pushstep.server.hooks.hook import StepContext
from pushstep.server.model import Model
from pushstep.server.session import Sessions
from pushstep.server.worker import Verdict


def test_what_a_snapshot_will_hold_stays_while_training_goes_on() -> None:
    """The files are written in a thread: a table that still grew would not be the one that its digest seals."""

    async def scenario() -> None:
        groups = ParamGroups(Group.make(group) for group in LAYOUT.manifest.groups)
        model = Model("m", b"uid", 1, LAYOUT, groups, Sessions(30, 100, "m"), Device(), 1 << 20)
        model.add_hook(
            "lr_scheduler",
            "step_post",
            {"scheduler": "MultiStepLR", "arguments": {"milestones": [1, 9]}},
            False,
            "test",
        )
        worker = model.sessions.join("w", 0.0, takeover=False)

        def one_more_step(metric: float) -> None:
            error = NonfiniteGradient(parameter="a", worker="w")
            receipt = Receipt(outcome=Outcome.OUTCOME_APPLIED, identity=Identity(worker="w", epoch=1))
            model.sessions.consume(worker, Verdict(1, receipt, error=error))
            error.fields["consumed"] = str(metric)
            context = StepContext("w", 0, 1, 0, metric, {}, {})
            model.hooks.step_post(context, model.groups)
            model.groups.list[1].values["eps"] = metric

        one_more_step(1.0)
        dumped = model.dump()
        text = json.dumps(dumped)
        one_more_step(2.0)
        assert json.dumps(dumped) == text
        assert json.dumps(model.dump()) != text
        await model.close()

    asyncio.run(scenario())
