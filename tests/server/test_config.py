"""Settings: where each comes from, which are refused, and that a wrong one ends the process with words."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from pushstep.server.__main__ import parser
from pushstep.server.config import MAX_UNIX_PATH_BYTES, Config, is_loopback, split_address
from tests.support.servers.harness import refused_start


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("PUSHSTEP_"):
            monkeypatch.delenv(name)


# one value per place for each setting, in order of precedence: argument, environment, file, default
VALUES: dict[str, tuple[Any, Any, Any, Any]] = {
    "grpc": ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:7070"),
    "http": ("127.0.0.1:1", "[::1]:2", "localhost:3", "127.0.0.1:7071"),
    "unix": ("/a", "/b", "/c", None),
    "data": (Path("a"), Path("b"), Path("c"), Path("pushstep-data")),
    "device": ("cuda:1", "cuda", "cpu", "cpu"),
    "tokens_file": (Path("/dev/null"), Path("/dev/./null"), Path("/dev/../dev/null"), None),
    "lease_s": (1.5, 2.5, 3.5, 30.0),
    "stall_s": (1.5, 2.5, 3.5, 10.0),
    "drain_s": (1.5, 2.5, 3.5, 20.0),
    "max_models": (1, 2, 3, 100),
    "max_bytes": (1, 2, 3, 1 << 40),
    "staging_bytes": (1, 2, 3, 8 << 30),
    "max_workers": (1, 2, 3, 10_000),
    "max_connections": (1, 2, 3, 20_000),
    "part_bytes": (0, 1, 2, 1 << 20),
    "read_bytes": (16 << 20, 17 << 20, 18 << 20, None),
    "worker_bytes": (1 << 20, 2 << 20, 3 << 20, 512 << 20),
    "durability": ("everysec", "durable", "applied", "applied"),
    "snapshot_every_s": (30.0, 90.0, 15.0, 60.0),
    "webhook_hosts": ("a.example.com", "b.example.com", "c.example.com", None),
    "webhook_networks": ("10.0.0.0/8", "10.1.0.0/16", "fd00::/8,10.0.0.0/8", None),
    "webhook_secrets": (Path("a"), Path("b"), Path("c"), None),
    "log_level": ("debug", "warning", "error", "info"),
    "log_format": ("json", "text", "json", "text"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=3)))
def test_argument_over_environment_over_file_over_default(
    name: str, given: tuple[bool, bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argument, environment, file, default = VALUES[name]
    arguments = ["--" + name.replace("_", "-"), str(argument)] if given[0] else []
    if given[1]:
        monkeypatch.setenv(f"PUSHSTEP_{name.upper()}", str(environment))
    path = tmp_path / "settings.toml"
    quoted = file if isinstance(file, (int, float)) else f'"{file}"'
    path.write_text(f"{name} = {quoted}\n" if given[2] else "")
    typed = vars(parser().parse_args([*arguments, "--config", str(path)]))
    config = Config.read(typed, typed.pop("config"))
    expected = next((v for v, has in zip((argument, environment, file), given, strict=False) if has), default)
    assert getattr(config, name) == expected


def test_every_setting_is_in_the_table() -> None:
    elsewhere = {"insecure", "no_shared_memory", "snapshots", "snapshots_takeover"}
    elsewhere |= {
        "tokens",
        "tls_cert",
        "tls_key",
        "tls_client_ca",
        "otel",
        "advertise",
        "link_token_file",
        "link_ca",
    }
    assert set(Config.model_fields) == {*VALUES, *elsewhere}


def test_the_url_of_the_snapshots_is_a_setting_that_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('snapshots = "s3://c"\n')
    assert Config.read({}, None).snapshots_url() == ""
    assert Config.read({}, path).snapshots_url() == "s3://c"
    monkeypatch.setenv("PUSHSTEP_SNAPSHOTS", "s3://me:topsecret@b")
    config = Config.read({}, path)
    assert config.snapshots_url() == "s3://me:topsecret@b"
    assert "topsecret" not in f"{config!r} {config}"
    assert Config.read(vars(parser().parse_args(["--snapshots", "s3://a"])), path).snapshots_url() == "s3://a"


def test_a_flag_is_a_setting_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("insecure = true\n")
    assert Config.read({}, None).insecure is False
    assert Config.read({}, path).insecure is True
    monkeypatch.setenv("PUSHSTEP_INSECURE", "false")
    assert Config.read({}, path).insecure is False
    assert Config.read(vars(parser().parse_args(["--insecure"])), path).insecure is True


def test_other_programs_files_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("PUSHSTEP_GRPC=127.0.0.1:5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC", "127.0.0.1:6")
    assert Config.read({}, None).grpc == "127.0.0.1:7070"


BAD: dict[str, tuple[list[str], str]] = {
    "no number": (["--max-models", "many"], "max_models"),
    "no network": (["--webhook-networks", "10.0.0.0/8,somewhere"], "webhook_networks"),
    "zero": (["--max-bytes", "0"], "max_bytes"),
    "negative": (["--lease-s", "-1"], "lease_s"),
    "nan": (["--stall-s", "nan"], "stall_s"),
    "infinite": (["--drain-s", "inf"], "drain_s"),
    "no port": (["--grpc", "localhost"], "HOST:PORT"),
    "no host": (["--http", ":7071"], "HOST:PORT"),
    "a port too far": (["--http", "127.0.0.1:65536"], "HOST:PORT"),
    "a negative port": (["--grpc", "127.0.0.1:-1"], "HOST:PORT"),
    "words for a port": (["--grpc", "127.0.0.1:http"], "HOST:PORT"),
    "device": (["--device", "tpu"], "unknown device"),
    "device number": (["--device", "cuda:x"], "unknown device"),
    "log level": (["--log-level", "loud"], "log_level"),
    "everywhere": (["--grpc", "0.0.0.0:0"], "--insecure"),
    "everywhere in IPv6": (["--http", "[::]:0"], "--insecure"),
    "a name": (["--http", "example.org:0"], "--insecure"),
    "a long socket path": (["--unix", "/" + "x" * MAX_UNIX_PATH_BYTES], "--unix"),
}


def read(arguments: list[str]) -> Config:
    return Config.read(vars(parser().parse_args(arguments)), None)


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case: str) -> None:
    arguments, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        read(arguments)


@pytest.mark.parametrize(
    "text",
    [
        "max_models = 'x'",
        "unknown = 1",
        "grpc = 5",
        "=",
        "a = \x00",
        "[grpc]\nhost = 'x'",
        "insecure = 'perhaps'",
    ],
)
def test_bad_files_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\w+"):
        Config.read({}, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="settings"):
        Config.read({}, path)
    with pytest.raises(ValueError, match="cannot read settings"):
        Config.read({}, tmp_path / "missing.toml")


@pytest.mark.parametrize(
    "arguments", [["--grpc", "0.0.0.0:0"], ["--http", "example.org:0"], ["--http", "[::]:0"]]
)
def test_insecure_listens_anywhere(arguments: list[str]) -> None:
    assert read([*arguments, "--insecure"]).insecure


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("address", "pair"),
    [("localhost:0", ("localhost", 0)), ("[::1]:80", ("::1", 80)), ("a:65535", ("a", 65535))],
)
def test_addresses(address: str, pair: tuple[str, int]) -> None:
    assert split_address(address) == pair


def test_unix_path_is_in_the_data_folder_unless_it_would_be_too_long(tmp_path: Path) -> None:
    assert Config(data=tmp_path).unix_path() == str(tmp_path / "pushstep.sock")
    assert Config(data=tmp_path / ("x" * 100)).unix_path() is None
    assert Config(data=tmp_path, unix="").unix_path() is None
    assert Config(data=tmp_path, unix="/a/b").unix_path() == "/a/b"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-models", "many"], "max_models"),
        (["--grpc", "0.0.0.0:0"], "--insecure"),
        (["--config", "/nonexistent"], "/nonexistent"),
        (["--no-such-setting"], "--no-such-setting"),
    ],
)
def test_wrong_settings_end_the_process_with_2_and_words(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    ended = refused_start(tmp_path / "data", *arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "data").exists()
