"""Build steps of prefect.yaml."""

from __future__ import annotations

from typing import Any

from tasks.domain.recipe import load_preset


def preset(name: str) -> dict[str, Any]:
    """The parameter set of a deployment: the preset file, its defaults written out, so that the form shows them."""
    return {"preset": load_preset(name).model_dump(mode="json")}
