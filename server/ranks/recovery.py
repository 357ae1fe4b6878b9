"""Where the models of all ranks go on after a start: at the newest version that every rank has.

A rank says what it has on its disk. If all have the same version of the same timeline, and nothing that was called safe can
be missing in one of them, they go on as they are. Otherwise all go back to the newest version that every rank can reach, by
its snapshots and its journal, on a new timeline: what a rank has beyond it was acknowledged to nobody, since that takes all
ranks. If a rank has lost what it had called safe (below `durable`), workers are told how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pushstep.proto.errors import ModelNotLoaded
from pushstep.proto.shards_pb2 import RankGoal, RankModel, RankReach

from ..links.words import heard, said
from ..parts.shard import Goal, Survey


def goal_of(name: str, own: Survey, theirs: Mapping[int, Mapping[str, Survey]]) -> Goal:
    """Where all ranks go on with one model. `own`: rank 0's. theirs: by rank, what the others have."""
    if own.problem is not None:
        return Goal(refused=own.problem)
    found = [own]
    for rank in own.others:
        survey = theirs.get(rank, {}).get(name)
        problem = ""
        if survey is None:
            problem = "it has nothing of it"
        elif survey.problem is not None:
            problem = survey.problem.message
        elif survey.uid != own.uid:
            problem = "it has a part of another model of this name"
        if survey is None or problem:
            return Goal(refused=ModelNotLoaded(model=name, problem=f"rank {rank}: {problem}"))
        found.append(survey)
    at = {(survey.timeline, survey.version) for survey in found}
    if len(at) == 1 and all(survey.proven for survey in found):
        return Goal()
    version = newest_in_common([survey.reaches for survey in found])
    if version is None:
        had = "; ".join(
            f"rank {rank}: {runs_of(survey)}" for rank, survey in zip((0, *own.others), found, strict=True)
        )
        problem = f"its ranks have no version in common that they can go back to ({had})"
        return Goal(refused=ModelNotLoaded(model=name, problem=problem))
    return Goal(version, 1 + max(survey.identity_timeline for survey in found))


def newest_in_common(reaches: Sequence[Sequence[tuple[int, int]]]) -> int | None:
    """The newest version that lies in a run of each."""
    tops = {last for runs in reaches for _, last in runs}
    common = [top for top in tops if all(any(a <= top <= b for a, b in runs) for runs in reaches)]
    return max(common, default=None)


def runs_of(survey: Survey) -> str:
    """Its runs of versions, in words."""
    runs = [str(first) if first == last else f"{first} to {last}" for first, last in survey.reaches]
    return ", ".join(runs) or "none"


def survey_of(message: RankModel) -> Survey:
    """What a rank has said of a model."""
    return Survey(
        message.uid,
        int(message.timeline),
        int(message.version),
        int(message.manifest_hash),
        int(message.identity_timeline),
        message.proven,
        [(int(run.first), int(run.last)) for run in message.reaches],
        problem=heard(message.problem) if message.HasField("problem") else None,
    )


def survey_message(name: str, survey: Survey) -> RankModel:
    """What a rank says of a model."""
    return RankModel(
        model=name,
        uid=survey.uid,
        timeline=survey.timeline,
        version=survey.version,
        manifest_hash=survey.manifest_hash,
        identity_timeline=survey.identity_timeline,
        proven=survey.proven,
        reaches=[RankReach(first=first, last=last) for first, last in survey.reaches],
        problem=None if survey.problem is None else said(survey.problem),
    )


def goal_message(name: str, goal: Goal) -> RankGoal:
    """Where rank 0 has a model go on."""
    return RankGoal(
        model=name,
        version=goal.version or 0,
        timeline=goal.timeline or 0,
        aside=goal.aside,
        refused=None if goal.refused is None else said(goal.refused),
    )


def goal_heard(message: RankGoal) -> Goal:
    """The same, as a rank hears it."""
    if message.aside:
        return Goal(aside=True)
    if message.HasField("refused"):
        return Goal(refused=heard(message.refused))
    return Goal(int(message.version), int(message.timeline))
