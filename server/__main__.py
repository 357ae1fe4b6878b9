"""`pushstep-server`: read the settings, run the service."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from pushstep.proto.environment import unknown_variables

from .config import Config
from .service import DataFolderLocked, Service

log = logging.getLogger("pushstep.server")


def parser() -> argparse.ArgumentParser:
    """One option per setting; none has a default here, so that only what was typed counts as an argument."""
    made = argparse.ArgumentParser(
        prog="pushstep-server",
        description="Hold models, take gradients over gRPC, take their optimizer steps. Each option may also be set "
        "as PUSHSTEP_NAME in the environment or as a key of the --config file (TOML), in that order of precedence.",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--version", action="version", version=f"pushstep {installed_version('pushstep')}")
    made.add_argument("--config", metavar="FILE", type=Path, help="TOML file with settings")
    for name, setting in Config.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if setting.annotation is bool:
            made.add_argument(option, action="store_true", help=setting.description)
            continue
        shown = "" if setting.default is None else f" [default: {setting.default}]"
        made.add_argument(option, metavar=name.upper(), help=f"{setting.description}{shown}")
    return made


async def _run(config: Config) -> None:
    await Service(config).run()


def main() -> None:
    """Run a server. Exit status 2: the settings are wrong; 1: it could not start."""
    arguments = vars(parser().parse_args())
    file = arguments.pop("config", None)
    try:
        config = Config.read(arguments, file)
    except ValueError as error:
        print(f"pushstep-server: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for problem in unknown_variables(os.environ):
        log.warning("%s", problem)
    try:
        asyncio.run(_run(config))
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # before the service listens for it
    except (OSError, DataFolderLocked) as error:
        print(f"pushstep-server: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
