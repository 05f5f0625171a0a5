"""Errors, by who must act. Each message names the setting, its value and what to do."""

from __future__ import annotations


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
