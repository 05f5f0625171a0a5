"""The consecutive decoder blocks that are removed."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.domain.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """Blocks start .. start+count-1 (0-based) of a model of `layers` blocks."""

    start: int
    count: int
    layers: int

    def __post_init__(self) -> None:
        if not 0 < self.count < self.layers:
            raise ConfigError(
                f"prune.blocks={self.count}: the model has {self.layers} blocks; remove between 1 and {self.layers - 1}"
            )
        if not 0 <= self.start <= self.layers - self.count:
            raise ConfigError(f"a span of {self.count} blocks from block {self.start} leaves the {self.layers} blocks")

    @property
    def removed(self) -> list[int]:
        return list(range(self.start, self.start + self.count))

    @property
    def kept(self) -> list[int]:
        return [block for block in range(self.layers) if block not in self.removed]

    def __str__(self) -> str:
        blocks = f"block {self.start}" if self.count == 1 else f"blocks {self.start}-{self.start + self.count - 1}"
        return f"removes {blocks} of 0-{self.layers - 1}"
