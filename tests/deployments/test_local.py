"""The embedded servers: shared by all runs of a checkout, stopped by the last, never mistaken for another's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import local
from tasks.domain.errors import PipelineError
from tests.conftest import ROOT


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(local, "STATE", tmp_path)
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def command(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]


def pid_of(state: Path) -> int:
    return int(json.loads((state / "server.json").read_text())["pid"])


def test_users_share_one_server_and_the_last_stops_it(state: Path) -> None:
    with local._service("files", command, port=local._free_port(), health="/", extra={}) as first:
        pid = pid_of(state)
        with local._service("files", command, port=local._free_port(), health="/", extra={}) as second:
            assert second == first
        assert local._answers(first)
    assert not local._answers(first)
    assert not Path(f"/proc/{pid}").exists()


def test_a_stranger_on_a_killed_servers_port_is_not_used(state: Path) -> None:
    with local._service("files", command, port=local._free_port(), health="/", extra={}) as url:
        os.killpg(pid_of(state), signal.SIGKILL)
        os.waitpid(pid_of(state), 0)
        stranger = subprocess.Popen(command(int(url.rsplit(":", 1)[1])), stderr=subprocess.DEVNULL)
        try:
            while not local._answers(url):
                assert stranger.poll() is None
            with local._service("files", command, port=local._free_port(), health="/", extra={}) as own:
                assert own != url
                second = pid_of(state)
        finally:
            stranger.kill()
            stranger.wait()
        assert local._answers(own), "its starter has left, but not the last user"
    assert not Path(f"/proc/{second}").exists()


def test_a_port_taken_between_choice_and_start_costs_a_second_try_only(state: Path) -> None:
    tries = list[int]()
    with socket.socket() as stranger:

        def late(port: int) -> list[str]:
            if not tries:
                stranger.bind(("127.0.0.1", port))
            tries.append(port)
            return command(port)

        with local._service("files", late, port=local._free_port(), health="/", extra={}) as url:
            assert local._answers(url)
    assert len(tries) == 2
    assert url.endswith(f":{tries[1]}") and tries[0] != tries[1]


def test_a_server_that_never_starts_is_an_error_with_its_last_words(state: Path) -> None:
    def broken(_port: int) -> list[str]:
        return [sys.executable, "-c", "print('wrong disk\\n\\ngoroutine 1'); raise SystemExit(1)"]

    last_words = r"files server did not start at .*server\.log:\nwrong disk\n$"
    with (
        pytest.raises(PipelineError, match=last_words),
        local._service("files", broken, port=local._free_port(), health="/", extra={}),
    ):
        pass


def test_a_commands_status_is_passed_on() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert local._run([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_what_the_user_has_set_for_other_servers_does_not_reach_the_embedded_ones(tmp_path: Path) -> None:
    foreign = {
        "AWS_SESSION_TOKEN": "of another account", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_PROFILE": "none",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "SDD_STORE" and not name.startswith("AWS_")}
    listed = subprocess.run(
        [sys.executable, "-m", "flows.artifacts", "list"], cwd=ROOT, text=True, capture_output=True, check=False,
        env={**kept, **foreign, "SDD_STATE": str(tmp_path / "state"), "SDD_MIRROR": str(tmp_path / "mirror")},
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
