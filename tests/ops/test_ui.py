"""The Prefect UI in a real browser: the form of a deployment, a run started there, its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from prefect.client.orchestration import get_client

from tasks.domain.recipe import Preset
from tests.ops.conftest import ended, ui_url, worker

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 120_000  # milliseconds


@pytest.fixture
def page(operations: Path) -> Iterator[Page]:
    assert CHROMIUM.exists(), "Chromium is not installed; apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield page
        browser.close()


def test_a_run_started_in_the_form_goes_green_and_shows_its_stages(page: Page, whole: UUID, preset: Preset) -> None:
    with get_client(sync_client=True) as client:
        demo = client.read_deployment_by_name("recover/demo-cpu")
        deployment = client.create_deployment(
            flow_id=demo.flow_id, name="pico", entrypoint=demo.entrypoint, pull_steps=demo.pull_steps,
            work_pool_name="cpu", parameter_openapi_schema=demo.parameter_openapi_schema,
            parameters={"preset": preset.model_dump(mode="json")},
        )  # fmt: skip
    page.goto(f"{ui_url()}/deployments/deployment/{deployment}/run")
    expect(page.get_by_text("Number n of consecutive decoder blocks to remove.")).to_be_visible()
    expect(page.get_by_text("Printed at the head of the report.")).to_be_visible()
    expect(page.get_by_text("Temperature (Optional)")).to_be_visible()
    with worker("cpu"):
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(re.compile("/runs/flow-run/"))
        run = UUID(re.findall("flow-run/([0-9a-f-]{36})", page.url)[0])
        final = ended(run)
    assert final.state is not None
    assert final.state.is_completed(), final.state.message
    page.reload()
    expect(page.get_by_text("pico-llama minus 2 blocks (pico)").first).to_be_visible()
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.get_by_text("Task Runs", exact=True).first.click()
    expect(page.get_by_text("prune pico-llama-n2").first).to_be_visible()
    expect(page.get_by_text("Cached").first).to_be_visible()
    page.get_by_text("Artifacts", exact=True).first.click()
    expect(page.get_by_text("recovery").first).to_be_visible()
    page.goto(f"{ui_url()}/artifacts/key/recovery")
    expect(page.get_by_text("SFT", exact=False).first).to_be_visible()
