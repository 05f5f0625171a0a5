"""Errors, by who must act. Each message names the setting, its value and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

# torch's own, vLLM's, and CUDA's of a library's allocation.
FULL_DEVICE = ("OutOfMemoryError: ", "less than desired GPU memory utilization", "CUDA error: out of memory")


class PipelineError(Exception):
    """Base of every error that the pipeline raises on purpose."""

    exit_status = 1
    retryable = False


class ConfigError(PipelineError):
    """A setting is wrong; the user must change it. Never retried."""

    exit_status = 2


class ModelUnsupported(ConfigError):
    """The model cannot go through the method (no causal LM, an unknown layout)."""


class DataError(ConfigError):
    """A dataset lacks what the preset says it has."""


class ArtifactError(PipelineError):
    """An artifact in the store does not match its manifest."""


class GateError(PipelineError):
    """A stage's result is not good enough to publish."""


class StoreUnavailable(PipelineError):
    """The object store does not answer; waiting may help."""

    retryable = True


class EngineError(PipelineError):
    """A child process failed; `retryable` says whether running it again may help."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class OutOfMemory(EngineError):
    """The device's memory did not suffice; the next try takes smaller batches."""


def device_full(said: str) -> bool:
    """Whether an error's type and words, or a log, say that a device's memory did not suffice."""
    return any(words in said for words in FULL_DEVICE)


def disk_full(error: BaseException, folders: Mapping[str, Path]) -> ConfigError | None:
    """The sentence for an error that says that a disk or a quota is full; None for any other error.

    folders: by the setting that names each; of several the one with the least room is taken for the culprit.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        is_full = error.errno in numbers
    else:  # libraries that write in Rust give the words and no number
        is_full = any(os.strerror(number) in str(error) for number in numbers)
    if not is_full:
        return None
    room = {setting: shutil.disk_usage(_existing(folder)).free for setting, folder in folders.items()}
    setting = min(room, key=room.__getitem__)
    return ConfigError(
        f"no space left on the disk of {setting}, in {folders[setting]} ({room[setting] / 1e6:.0f} MB are free); free "
        f"some, {'lower SDD_MIRROR_GB, ' * (setting == 'SDD_MIRROR')}or let {setting} name a folder on another disk; "
        "the same command then goes on where it was"
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
