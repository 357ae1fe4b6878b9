"""Generate the Python code beside each .proto: `python proto/generate.py`; `--check` reports what is stale.

The generator is pinned to the oldest grpcio-tools that the runtime floor in pyproject.toml allows, because generated
code refuses runtimes older than its generator. The compiler is given a virtual path, so that the folder stays flat and
the output imports `pushstep.proto`; nothing is rewritten afterwards.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent


def generate(target: Path) -> dict[str, bytes]:
    """Compile every .proto of this folder into `target`; the generated files' bytes by name."""
    from grpc_tools import protoc

    names = sorted(path.name for path in HERE.glob("*.proto"))
    arguments = [
        "protoc",
        f"-Ipushstep/proto={HERE}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--python_out={target}",
        f"--pyi_out={target}",
        *(f"pushstep/proto/{name}" for name in names),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")
    services = [name for name in names if "\nservice " in (HERE / name).read_text()]
    arguments[3:5] = [f"--grpc_python_out={target}"]
    arguments[4:] = [f"pushstep/proto/{name}" for name in services]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")
    return {path.name: path.read_bytes() for path in (target / "pushstep" / "proto").iterdir()}


def main() -> None:
    """Write the generated files, or with --check exit 1 and name the stale ones."""
    with tempfile.TemporaryDirectory() as folder:
        files = generate(Path(folder))
    if "--check" in sys.argv[1:]:
        stale = [name for name, body in files.items() if _read(HERE / name) != body]
        if stale:
            raise SystemExit(f"stale: {', '.join(sorted(stale))}; run: python proto/generate.py")
        return
    for name, body in files.items():
        (HERE / name).write_bytes(body)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


if __name__ == "__main__":
    main()
