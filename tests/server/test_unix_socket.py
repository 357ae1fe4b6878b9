"""The path of a Unix socket: taken only where nothing is lost by it, by one of those who want it, and given back once."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pushstep.server.process.unix_socket import UnixSocket
from tests.support.servers.harness import refused_start, running_server


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Short enough wherever the test's folder is."""
    here = os.getcwd()
    os.chdir(tmp_path)
    yield Path("s")
    os.chdir(here)


def listening(path: Path) -> tuple[UnixSocket, socket.socket]:
    place = UnixSocket(str(path))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with place.taken() as bound:
            listener.bind(bound)
            listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return place, listener


def reach(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.connect(str(path))


def test_it_is_the_users_own_and_goes_with_its_server(path: Path) -> None:
    place, listener = listening(path)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert os.listdir(".") == ["s"]
    reach(path)
    place.release()
    listener.close()
    assert os.listdir(".") == []
    place.release()


def a_file(path: Path) -> None:
    path.write_text("my thesis")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [a_file, a_folder, a_link, a_fifo], ids=lambda make: make.__name__)
def test_nothing_else_is_removed(make: Callable[[Path], None], path: Path) -> None:
    make(path)
    before = path.lstat()
    with pytest.raises(OSError, match="is no socket"):
        listening(path)
    assert path.lstat() == before
    assert os.listdir(".") == ["s"]


def test_where_somebody_listens_is_not_free(path: Path) -> None:
    place, listener = listening(path)
    with pytest.raises(OSError, match="another process listens"):
        listening(path)
    reach(path)
    listener.close()  # as when its process is killed
    after, other = listening(path)
    reach(path)
    place.release()  # of the dead one: what lies there is another's by now
    reach(path)
    after.release()
    other.close()
    assert os.listdir(".") == []


def test_what_has_taken_its_place_is_not_removed(path: Path) -> None:
    place, listener = listening(path)
    path.unlink()
    path.write_text("my thesis")
    place.release()
    listener.close()
    assert path.read_text() == "my thesis"


def test_a_block_that_fails_leaves_nothing(path: Path) -> None:
    with pytest.raises(RuntimeError), UnixSocket(str(path)).taken():
        raise RuntimeError
    assert os.listdir(".") == []


def test_of_many_at_one_moment_one_has_it(path: Path) -> None:
    """A dead server's socket lies there, which each of them finds."""
    _, dead = listening(path)
    dead.close()

    def attempt(_: int) -> tuple[UnixSocket, socket.socket] | None:
        try:
            return listening(path)
        except OSError:
            return None

    with ThreadPoolExecutor(16) as threads:
        (won,) = [found for found in threads.map(attempt, range(64)) if found is not None]
    reach(path)
    won[0].release()
    won[1].close()


@pytest.mark.parametrize("name", ["model.pt", "model.pt.memory"])
def test_a_server_starts_over_nobodys_file(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("my thesis")
    monkeypatch.chdir(tmp_path)
    ended = refused_start(data, "--unix", "model.pt")
    assert ended.returncode == 1
    assert f"{name} is no socket" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / name).read_text() == "my thesis"
    assert [entry.name for entry in tmp_path.iterdir() if entry != data] == [name]


def test_two_servers_do_not_share_a_path(data: Path, tmp_path: Path) -> None:
    with running_server(data, "--unix", str(tmp_path / "s")) as first:
        ended = refused_start(tmp_path / "other", "--unix", str(tmp_path / "s"))
        assert ended.returncode == 1
        assert "another process listens" in ended.stderr
        first.connect("m", address=f"unix:{tmp_path / 's'}")
