"""What the Prefect server does by itself when a worker dies or a run goes wrong.

    python -m deployments.automations          create them, or bring them up to date (part of `make deploy`)

With SDD_NOTIFY_URL (a Slack or other webhook that takes {"text": ...}) failures are reported there, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from tasks.domain.recipe import LOW_RECOVERY

SILENCE = timedelta(seconds=100)  # three heartbeats of 30 s
STARTS = 3  # of one run, the first included
TERMINAL = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
HEARTBEAT = "prefect.flow-run.heartbeat"
ANY_RUN = {"prefect.resource.id": "prefect.flow-run.*"}
TOLD = {  # what a run did -> event, text
    "failed": ("prefect.flow-run.Failed", "{{ flow_run.name }}: {{ flow_run.state.message }} {{ flow_run|ui_url }}"),
    "crashed": (
        "prefect.flow-run.Crashed",
        "{{ flow_run.name }}: {{ flow_run.state.message }} (start {{ flow_run.run_count }}) {{ flow_run|ui_url }}",
    ),
    "recovered too little": (
        LOW_RECOVERY,
        "{{ flow_run.name }}: {{ event.payload.told }}; {{ event.payload.report }} {{ flow_run|ui_url }}",
    ),
}


def automations() -> Iterator[AutomationCore]:
    yield AutomationCore(
        name="sdd: a silent run has crashed",
        description="No heartbeat: its machine is gone, and nobody else will say so.",
        trigger=EventTrigger(
            posture=Posture.Proactive, match=ANY_RUN, match_related=tagged("sdd"), for_each={"prefect.resource.id"},
            after={HEARTBEAT}, expect={HEARTBEAT, *TERMINAL}, threshold=1, within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat; its worker is gone")],
    )  # fmt: skip
    yield AutomationCore(
        name="sdd: a crashed run starts again",
        description="Finished stages are hits, so it goes on where it was.",
        trigger=EventTrigger(
            posture=Posture.Reactive, match_related=tagged("reschedule"), for_each={"prefect.resource.id"},
            match={**ANY_RUN, "prefect.run-count": [str(count) for count in range(STARTS)]},
            expect={"prefect.flow-run.Crashed"}, threshold=1, within=timedelta(0),
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="its worker died")],
    )  # fmt: skip
    if url := os.environ.get("SDD_NOTIFY_URL"):
        block = CustomWebhookNotificationBlock(
            name="sdd", url="{{url}}", secrets={"url": url}, json_data={"text": "{{subject}}\n{{body}}"}, timeout=10
        ).save("sdd-notify", overwrite=True)
        for what, (event, body) in TOLD.items():
            yield AutomationCore(
                name=f"sdd: tell who {what}",
                trigger=EventTrigger(
                    posture=Posture.Reactive, match=ANY_RUN, match_related=tagged("sdd"),
                    for_each={"prefect.resource.id"}, expect={event}, threshold=1, within=timedelta(0),
                ),
                actions=[SendNotification(block_document_id=block, subject=f"A run {what}", body=body)],
            )  # fmt: skip


def tagged(tag: str) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}


def main() -> int:
    with get_client(sync_client=True) as client:
        for automation in automations():
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)
            print(f"automation: {automation.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
