"""`pushstep-server`: read the settings, run the service."""

from __future__ import annotations

import gc

# what is imported here stays: to visit it again and again takes 0.3 s of a start, which lasts 1.5
_collects = gc.isenabled()
gc.disable()

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, NoReturn

from pushstep.proto.environment import unknown_variables
from pushstep.proto.errors import PushstepError

from .access.roles import Role
from .access.tokens import line_of, made_token
from .config import Config
from .links.job import Job, job_of
from .process import logs
from .process.exit_status import ExitStatus
from .process.folder_lock import DataFolderLocked
from .service import Service

gc.freeze()
if _collects:
    gc.enable()

log = logging.getLogger("pushstep.server")


class _Refused(argparse.Action):
    """A secret as an argument: every user of the machine sees it in the list of processes."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error("tokens are no arguments, which every user of this machine can see: use --tokens-file")


def parser() -> argparse.ArgumentParser:
    """The command line's parser: one option per setting.

    No option has a default, so only typed options count.
    """
    made = argparse.ArgumentParser(
        prog="pushstep-server",
        description="Hold models, take gradients over gRPC, take their optimizer steps. Each option may also be set "
        "as PUSHSTEP_NAME in the environment or as a key of the --config file (TOML), in that order of precedence.",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--version", action="version", version=f"pushstep {installed_version('pushstep')}")
    made.add_argument("--config", metavar="FILE", type=Path, help="TOML file with settings")
    made.add_argument(
        "--make-token",
        metavar="ROLE",
        choices=[role.value for role in Role],
        help=f"print a new token for a {', '.join(Role)}, and the line that lets it in, and end",
    )
    made.add_argument(
        "--name", help="with --make-token: whose it is, as events name them [default: the role]"
    )
    made.add_argument(
        "--models", help="with --make-token: the only models that it is for, such as flights,test-*"
    )
    made.add_argument(
        "--worker", help="with --make-token worker: the only workers' names that it is for, such as w0,gpu-*"
    )
    for name, setting in Config.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if name == "tokens":
            made.add_argument(option, "--token", action=_Refused, nargs="?", help=argparse.SUPPRESS)
            continue
        if setting.annotation is bool:
            made.add_argument(option, action="store_true", help=setting.description)
            continue
        shown = "" if setting.default is None else f" [default: {setting.default}]"
        made.add_argument(option, metavar=name.upper(), help=f"{setting.description}{shown}")
    return made


def _make_token(role: str, name: str = "", models: str = "", worker: str = "") -> int:
    """Print a new token and its line. It is shown this once."""
    token = made_token()
    try:
        line = line_of(token, name or role, Role(role), models, worker)
    except ValueError as error:
        print(f"pushstep-server: {error}", file=sys.stderr)
        return ExitStatus.BAD_SETTINGS
    print("The token, which is shown this once, and its line for --tokens-file or settings:", file=sys.stderr)
    print(f"{token}\n{line}")
    return 0


async def _run(config: Config, job: Job | None) -> ExitStatus:
    return await Service(config, job).run()


def serve(arguments: Sequence[str] | None = None) -> int:
    """Run a server; returns an `ExitStatus`, or 130 if it is interrupted before the service starts."""
    os.umask(0o077)  # files are for this user only: parameters, worker names, compiled kernels
    settings = vars(parser().parse_args(arguments))
    file = settings.pop("config", None)
    role = settings.pop("make_token", None)
    named = {option: settings.pop(option) for option in ("name", "models", "worker") if option in settings}
    if role is not None:
        return _make_token(role, **named)
    if named:
        print("pushstep-server: --name, --models and --worker go with --make-token", file=sys.stderr)
        return ExitStatus.BAD_SETTINGS
    try:
        config = Config.read(settings, file)
        job = job_of(os.environ)
        config = config if job is None else config.of_rank(job.rank, job.local_rank)
    except ValueError as error:
        print(f"pushstep-server: {error}", file=sys.stderr)
        return ExitStatus.BAD_SETTINGS
    writer = logs.start(config.log_level, config.log_format)
    for problem in unknown_variables(os.environ):
        log.warning("%s", problem)
    try:
        status = asyncio.run(_run(config, job))
    except KeyboardInterrupt:
        return 130  # the service had not installed its signal handlers yet
    except (OSError, DataFolderLocked, MemoryError, PushstepError) as error:
        writer.say(f"pushstep-server: {error or 'out of memory'}")
        status = ExitStatus.NOT_STARTED
    if status is ExitStatus.NOT_ALL_SAVED:
        writer.say("pushstep-server: not every model could be saved; the lines above name them")
    return status


def main() -> NoReturn:
    """Run a server, then end the process with its exit status."""
    status = serve()
    logging.shutdown()
    # Everything is saved and closed. A normal exit of the interpreter takes another second, and an error in it would
    # replace the status.
    os._exit(status)


if __name__ == "__main__":
    main()
