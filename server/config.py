"""The server's settings, read once: argument > environment PUSHSTEP_* > TOML file > default."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .access.certificates import Files, require_usable
from .access.tokens import Token, Tokens, read_tokens
from .coordinator.hooks.hook import Place
from .coordinator.settings import LARGEST_S, problems
from .devices.choose import split_device
from .journal.durability import DurabilitySettings
from .journal.journal import Level

MAX_UNIX_PATH_BYTES = 107  # sun_path has 108 with the final zero
# Room for a few messages to each of a few readers.
LEAST_READ_BYTES = 16 << 20
# Two ranks with 512 KB each take an exchange as fast as one with 1 MB does, and four with 256 KB take 1.5 times as long.
PART_BYTES = 1 << 20


def _lines(value: Any) -> Any:
    """Tokens in one text, as in the environment, are separated by line ends or semicolons."""
    return re.split(r"[\n;]", value) if isinstance(value, str) else value


class Config(BaseSettings):
    """The settings of one server, fixed when it starts."""

    model_config = SettingsConfigDict(env_prefix="PUSHSTEP_", extra="forbid", frozen=True)

    _file_settings: ClassVar[Mapping[str, Any]] = {}
    # what it was read from: the arguments and the file
    _origin: tuple[Mapping[str, Any], Path | None] = PrivateAttr(({}, None))

    grpc: str = Field("127.0.0.1:7070", description="HOST:PORT for workers; port 0 takes a free one")
    http: str = Field("127.0.0.1:7071", description="HOST:PORT for operators; port 0 takes a free one")
    unix: str | None = Field(
        None, description="path of the Unix socket [default: pushstep.sock in the data folder; '' for none]"
    )
    no_shared_memory: bool = Field(
        False, description="have workers on this host, or on this GPU, send frames, too"
    )
    data: Path = Field(
        Path("pushstep-data"), description="folder for snapshots and journals; locked by this server"
    )
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    insecure: bool = Field(False, description="listen beyond loopback without TLS and tokens")
    tokens_file: Path | None = Field(
        None,
        description="file with a line for each token: NAME ROLE TOKEN, or sha256:HASH in its place, and MODELS",
    )
    tokens: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_lines)] = Field(
        None, repr=False, description="such lines, from the environment; in a TOML file with hashes only"
    )
    tls_cert: Path | None = Field(
        None, description="PEM file with the certificate of both doors, and its chain"
    )
    tls_key: Path | None = Field(None, description="PEM file with its private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file with the CAs of callers' certificates: nobody is let in without one"
    )
    lease_s: float = Field(30.0, gt=0, allow_inf_nan=False, description="a worker silent for longer is gone")
    stall_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="a caller that sends nothing, or reads nothing, for longer is dropped",
    )
    drain_s: float = Field(
        20.0, gt=0, allow_inf_nan=False, description="how long a stop waits for pushes in flight"
    )
    max_models: int = Field(100, ge=1, description="models held at once")
    max_bytes: int = Field(1 << 40, ge=1, description="bytes of parameters and optimizer state held at once")
    staging_bytes: int = Field(8 << 30, ge=1, description="bytes of pushes in flight at once")
    read_bytes: int | None = Field(
        None,
        ge=LEAST_READ_BYTES,
        description="bytes kept for readers at once, apart from those of pushes [default: as many as --staging-bytes]",
    )
    max_workers: int = Field(10_000, ge=1, description="workers live at once, and remembered, per model")
    worker_bytes: int = Field(
        512 << 20, ge=1 << 20, description="bytes of remembered workers, their receipts and states, per model"
    )
    max_connections: int = Field(
        20_000,
        ge=1,
        description="workers' connections held at once; fewer if this process may not open as many files",
    )
    part_bytes: int = Field(
        PART_BYTES,
        ge=0,
        lt=1 << 63,
        description="a rank that has a part of a new model has about so many bytes of its parameters, or more; 0: all have one",
    )
    durability: Literal["applied", "everysec", "durable"] = Field(
        "applied", description="how safe a push of a new model is when it is acknowledged"
    )
    snapshot_every_s: float = Field(
        60.0,
        gt=0,
        le=LARGEST_S,
        allow_inf_nan=False,
        description="a new model is saved so often while something changes",
    )
    snapshots: SecretStr | None = Field(
        None,
        description="URL of a store to keep snapshots in, such as s3://bucket/path or file:///path [default: the data folder]",
    )
    snapshots_takeover: bool = Field(
        False, description="take over the snapshots at that URL from another server, which is gone for ever"
    )
    webhook_hosts: str | None = Field(
        None,
        description="hosts that webhook hooks may reach, as HOST or HOST:PORT, with commas [default: none]",
    )
    webhook_networks: str | None = Field(
        None,
        description="private networks that they may reach nevertheless, such as 10.1.0.0/16, with commas [default: none]",
    )
    webhook_secrets: Path | None = Field(
        None, description="folder with the secrets of webhook hooks: a file each, which the hook names"
    )
    advertise: str | None = Field(
        None,
        description="HOST or HOST:PORT at which workers and other ranks reach this one of several [default: as --grpc]",
    )
    link_token_file: Path | None = Field(
        None, description="file with an operator's token, by which a rank of several comes to rank 0"
    )
    link_ca: Path | None = Field(
        None, description="PEM file with the CAs by which a rank of several knows rank 0's certificate"
    )
    otel: bool = Field(
        False, description="send spans of pushes and pulls by OpenTelemetry; OTEL_* variables say where to"
    )
    log_format: Literal["text", "json"] = Field("text", description="text, or one JSON object for each line")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, file; no .env and no secrets folder."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(cls._file_settings))

    @classmethod
    def read(cls, arguments: dict[str, Any], file: Path | None) -> Config:
        """The settings of this process. ValueError, with a message for the user, if one is not valid."""
        from_file: dict[str, Any] = {}
        # TomlConfigSettingsSource passes over a file that is missing, and over a pipe
        if file is not None:
            try:
                from_file = tomllib.loads(file.read_text())
            except (OSError, ValueError) as error:  # not TOML, or not text
                raise ValueError(f"cannot read settings from {file}: {error}") from error
            if isinstance(text := _lines(from_file.get("tokens")), list):
                list(read_tokens(map(str, text), f"tokens in {file}", hashed_only=True))
        try:
            made = (cls if file is None else _with_file(cls, from_file))(**arguments)
            made._origin = arguments, file
            return made
        except ValidationError as error:
            raise ValueError(problems(error.errors(), whole="settings")) from error

    @field_validator("grpc", "http")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        split_device(value)
        return value

    @field_validator("webhook_networks")
    @classmethod
    def _networks(cls, value: str | None) -> str | None:
        for network in listed(value):
            ipaddress.ip_network(network)
        return value

    @model_validator(mode="after")
    def _usable(self) -> Self:
        Tokens(self.read_tokens() or ())  # none of them twice
        require_usable(self.tls_cert, self.tls_key, self.tls_client_ca)
        lacking = [
            what
            for what, is_there in (
                ("TLS (--tls-cert, --tls-key)", self.tls_files() is not None),
                ("tokens (--tokens-file)", self.has_tokens()),
            )
            if not is_there
        ]
        for name in ("grpc", "http"):
            host, _ = split_address(getattr(self, name))
            if lacking and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"--{name} {host} is not loopback, and anyone who reaches it could change the models: there it "
                    f"takes {' and '.join(lacking)}; or listen on 127.0.0.1, or pass --insecure on a network that you trust"
                )
        if self.unix and len(self.unix.encode()) > MAX_UNIX_PATH_BYTES:
            raise ValueError(f"--unix: a socket path has at most {MAX_UNIX_PATH_BYTES} bytes")
        return self

    def of_rank(self, rank: int, local_rank: int) -> Config:
        """The settings of one rank of several: a folder of its own in --data, and, on one host, a port of its own.

        ValueError for settings that are not for ranks.
        """
        if self.snapshots is not None or self.device != "cpu":
            raise ValueError("a rank of several keeps its snapshots in --data, and its part on --device cpu")
        host, port = split_address(self.grpc)
        shown = f"[{host}]" if ":" in host else host
        unix = f"{self.unix}.{rank}" if self.unix and rank else self.unix
        made = self.model_copy(
            update={
                "data": self.data / f"rank-{rank}",
                "grpc": f"{shown}:{port + local_rank if port else 0}",
                "unix": unix,
            }
        )
        made._origin = self._origin
        return made

    def again(self) -> Config:
        """The settings as they are now, from the same arguments, environment and files. ValueError."""
        return type(self).read(dict(self._origin[0]), self._origin[1])

    def has_tokens(self) -> bool:
        """Whether there is a source of tokens, however many tokens it has: then nobody comes in without one."""
        return self.tokens is not None or self.tokens_file is not None

    def read_tokens(self) -> list[Token] | None:
        """The tokens in all sources as they are now; None without a source. ValueError, which shows no token."""
        if not self.has_tokens():
            return None
        found = list(read_tokens(self.tokens or (), "tokens"))
        if self.tokens_file is not None:
            try:
                lines = self.tokens_file.read_text().splitlines()
            except (OSError, ValueError) as error:  # not there, or not text
                problem = error.strerror if isinstance(error, OSError) else "it is no text"
                raise ValueError(f"cannot read tokens from {self.tokens_file}: {problem}") from None
            found += read_tokens(lines, str(self.tokens_file))
        return found

    def tls_files(self) -> Files | None:
        """Where the certificates of both doors are; None to serve without TLS."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return Files(self.tls_cert, self.tls_key, self.tls_client_ca)

    def reading_bytes(self) -> int:
        """Bytes that may be held for all readers together."""
        return self.read_bytes or max(self.staging_bytes, LEAST_READ_BYTES)

    def place(self, model: str) -> Place:
        """What the observers of a model may use."""
        hosts, networks = listed(self.webhook_hosts), listed(self.webhook_networks)
        return Place(model, self.data, hosts, networks, self.webhook_secrets)

    def durability_settings(self) -> DurabilitySettings:
        """How a new model is kept on the disk."""
        return DurabilitySettings(level=Level(self.durability), snapshot_every_s=self.snapshot_every_s)

    def snapshots_url(self) -> str:
        """The URL of the store of snapshots, with what may be secret in it; "" for none."""
        return self.snapshots.get_secret_value() if self.snapshots is not None else ""

    def unix_path(self) -> str | None:
        """The path of the Unix socket; None for no socket, also when the default path is too long."""
        if self.unix is not None:
            return self.unix or None
        path = str(self.data.resolve() / "pushstep.sock")
        return path if len(path.encode()) <= MAX_UNIX_PATH_BYTES else None

    def memory_path(self) -> str:
        """The path of the local socket for shared memory, beside the Unix socket. Empty for no socket."""
        path = f"{self.unix_path() or ''}.memory"
        usable = not self.no_shared_memory and self.unix_path() and hasattr(os, "memfd_create")
        return path if usable and len(path.encode()) <= MAX_UNIX_PATH_BYTES else ""


def _with_file(kind: type[Config], file_settings: Mapping[str, Any]) -> type[Config]:
    """A subclass of `kind` with a file's settings as its third source."""
    return type("Config", (kind,), {"_file_settings": dict(file_settings), "__annotations__": {}})


def listed(value: str | None) -> tuple[str, ...]:
    """The entries of a setting that has several, with commas between them."""
    return tuple(entry.strip() for entry in (value or "").split(",") if entry.strip())


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT as a pair; an IPv6 host is in brackets. ValueError if it is something else."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
