"""A stage is a value: name, version, recipe and inputs. Its key says what its artifact is.

The key is the sha256 of the canonical encoding of those four, so it is known before anything
runs, and whatever is not in the recipe (device, batch size, paths, retries) cannot change it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ABSENT = object()
KEY_LENGTH = 12  # hex digits of the key that stand in an artifact's address


@dataclass(frozen=True)
class Stage:
    """One node of the pipeline.

    name: what it does, e.g. "score"; also the first folder of its address.
    version: raised by hand whenever the meaning of the stage changes.
    recipe: every setting that changes the bytes of the result (JSON values only).
    inputs: the stages whose artifacts it reads, by role.
    slug: what a person reads in the address; not part of the key.
    """

    name: str
    version: int
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    slug: str = "artifact"

    @cached_property
    def key(self) -> str:
        """sha256, in hex, of the canonical encoding of name, version, recipe and input keys."""
        return hashlib.sha256(canonical_json(self.identity()).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "version": self.version,
            "recipe": dict(self.recipe),
            "inputs": {role: stage.key for role, stage in self.inputs.items()},
        }

    @property
    def address(self) -> str:
        """Folder of the artifact below the store's root."""
        return f"{self.name}/{self.slug}-{self.key[:KEY_LENGTH]}"


def canonical_json(value: Any) -> str:
    """Encode JSON values in one way only; raise TypeError on what JSON cannot hold exactly."""
    _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} cannot enter a key")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: the name {name!r} is not a string")
            _check(item, f"{where}.{name}")
    else:
        raise TypeError(f"{where}: a {type(value).__name__} cannot enter a key")


def json_lines(path: Path) -> list[str]:
    """The lines of a JSONL file; `splitlines` would break them at U+2028 and others that JSON strings may hold."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two identities differ, as `name: old -> new`."""
    changes: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        where = f"{prefix}{name}"
        before, after = (side.get(name, ABSENT) for side in (old, new))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_fields(before, after, f"{where}.")
        elif _short(before, None) != _short(after, None):
            changes.append(f"{where}: {_short(before)} -> {_short(after)}")
    return changes


def _short(value: Any, longest: int | None = 40) -> str:
    text = "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."
