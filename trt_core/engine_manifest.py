"""What a cache entry says about itself: key, machine, and size and sha256 of each payload."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from .gpu import environment

FORMAT = "trt_core.engine"
SCHEMA = 1
"""Raised when the manifest, or the meaning of any key field, changes; part of every digest."""
MANIFEST = "manifest.json"
CODE_KIND = "inductor"
"""Entries of this kind are pickles, which run whatever their author wrote: they stay on the machine that made them."""
DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,98}[a-z0-9]")
"""Lower case and no separators: the same file on every system, and never outside its folder."""
_LONGEST_PAYLOAD_NAME = 64


class UnusableError(ValueError):
    """An entry that cannot be used, and why. `ours` says whether this library may delete it."""

    def __init__(self, reason: str, *, ours: bool = True) -> None:
        self.reason, self.ours = reason, ours
        super().__init__(reason)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII. `ValueError` for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_file_name(name: str) -> bool:
    """Whether a payload's file may have this name."""
    return bool(_FILE_NAME.fullmatch(name)) and name != MANIFEST


def check_payload_name(name: str) -> None:
    """Raises `ValueError` for a name that payloads cannot have; an update adds to it to make a file name."""
    if not is_file_name(name) or len(name) > _LONGEST_PAYLOAD_NAME:
        raise ValueError(f"payload name {name!r} must match {_FILE_NAME.pattern} and not be {MANIFEST}")


def digest_of(kind: str, fields: Mapping[str, Any], seen: Mapping[str, str]) -> str:
    return sha256(canonical_json({"schema": SCHEMA, "kind": kind, "fields": fields, "environment": seen}))


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What a compiled thing was made from: its kind and all options that change its bytes, as JSON values.

    GPU, driver and package versions need not be in `fields`: the digest adds the environment.
    """

    kind: str
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        # A copy in JSON's own types: equal before and after a trip to disk, and out of the caller's hands.
        object.__setattr__(self, "fields", json.loads(canonical_json(dict(self.fields))))

    def __hash__(self) -> int:
        return hash((self.kind, canonical_json(self.fields)))

    @property
    def digest(self) -> str:
        """64 hex digits over kind, fields, schema and this machine's environment with the current GPU."""
        return digest_of(self.kind, self.fields, environment())


@dataclass(frozen=True, slots=True)
class Payload:
    """One stored file. An update never writes in place: `file` then differs from the payload's name."""

    file: str
    size: int
    sha256: str

    @classmethod
    def of(cls, file: str, data: bytes) -> Payload:
        return cls(file, len(data), sha256(data))

    def why_not(self, data: bytes) -> str | None:
        """Why `data` is not this payload, or None when it is."""
        if len(data) != self.size:
            return f"{self.file} has {len(data)} bytes instead of {self.size}"
        if sha256(data) != self.sha256:
            return f"{self.file} has other bytes than were written (sha256 differs)"
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The readable half of a cache entry; `created` in seconds since 1970."""

    kind: str
    fields: Mapping[str, Any]
    environment: Mapping[str, str]
    info: Mapping[str, Any]
    created: float
    payloads: Mapping[str, Payload]

    @classmethod
    def describe(cls, key: EngineKey, files: Mapping[str, bytes], info: Mapping[str, Any]) -> Manifest:
        """A manifest for `files` built here and now; `ValueError` for a name that is no plain file name."""
        for name in files:
            check_payload_name(name)
        payloads = {name: Payload.of(name, data) for name, data in files.items()}
        plain_info = json.loads(json.dumps(dict(info), allow_nan=False))
        return cls(key.kind, key.fields, environment(), plain_info, time.time(), payloads)

    @property
    def key(self) -> EngineKey:
        return EngineKey(self.kind, self.fields)

    @property
    def digest(self) -> str:
        """The name of the entry's folder, from what the manifest itself says."""
        return digest_of(self.kind, self.fields, self.environment)

    @property
    def size_bytes(self) -> int:
        return sum(payload.size for payload in self.payloads.values())

    def encode(self) -> bytes:
        document = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest in `data`; `UnusableError` with the reason for anything that is not exactly one."""
        document = decode_document(data, FORMAT, SCHEMA)
        if not is_environment(document.get("environment")):
            raise UnusableError("its manifest names no environment")
        try:
            return cls(
                kind=_typed(document["kind"], str),
                fields=_typed(document["fields"], dict),
                environment=document["environment"],
                info=_typed(document["info"], dict),
                created=float(_typed(document["created"], int, float)),
                payloads={_name(name): _payload(value) for name, value in document["payloads"].items()},
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UnusableError(f"its manifest lacks or garbles a field ({error})") from error


def decode_document(data: bytes, format_name: str, schema: int) -> dict[str, Any]:
    """A JSON object of our format and schema; raises `UnusableError` with the reason."""
    try:
        document = json.loads(data)
        canonical_json(document)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"its description is no JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != format_name:
        raise UnusableError(f"it is not a {format_name} file", ours=False)
    if (found := document.get("schema")) != schema:
        newer = isinstance(found, int) and found > schema
        by = "a newer version of trt_core" if newer else "another version of trt_core"
        raise UnusableError(f"it was made by {by} (schema {found}, here {schema})", ours=not newer)
    return document


def is_environment(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a decoded JSON value has the type of `gpu.environment()`."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _typed(value: Any, *types: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{str(value)[:40]!r} is not {' or '.join(kind.__name__ for kind in types)}")
    return value


def _name(name: str) -> str:
    if not is_file_name(name):
        raise TypeError(f"{name[:40]!r} is no file name")
    return name


def _payload(value: Any) -> Payload:
    size = _typed(value["size"], int)
    if size < 0:
        raise TypeError(f"size {size}")
    return Payload(_name(_typed(value["file"], str)), size, _typed(value["sha256"], str))
