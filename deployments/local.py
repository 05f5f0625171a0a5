"""The embedded stack: a real S3 server and a real Prefect server on 127.0.0.1, their state under .local/.

    python -m deployments.local                  both, in the foreground until Ctrl-C (`make ui`)
    python -m deployments.local COMMAND ...      a command that uses them, e.g. `prefect worker start --pool cpu`

`flows.recover` starts whichever of the two the environment does not name (SDD_STORE, PREFECT_API_URL).
Runs at the same time share one stack, and the last to leave stops it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tasks.domain.errors import ConfigError, PipelineError

STATE = Path(os.environ.get("SDD_STATE", ".local")).absolute()
STARTUP_SECONDS = 90
START_TRIES = 3
S3_PORTS = ("master.port", "volume.port", "filer.port", "admin.port", "s3.port.grpc")
PREFECT_SETTINGS = {
    "PREFECT_HOME": str(STATE / "prefect"),
    "PREFECT_LOCAL_STORAGE_PATH": str(STATE / "prefect" / "storage"),
    "PREFECT_SERVER_MEMO_STORE_PATH": str(STATE / "prefect" / "memo.toml"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_METRICS_ENABLED": "true",
    "PREFECT_UI_API_URL": "/api",  # else the pages of a server on another port ask the one on 4200
    # Leases in memory would keep a killed holder's slot for ever once the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


# boto would combine them with the embedded store's own.
FOREIGN_S3 = (
    "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "FSSPEC_S3",
)  # fmt: skip


@contextmanager
def environment(*, prefect: bool) -> Iterator[None]:
    """Set the variables of the store and, if asked for, of the Prefect API; start what nobody named."""
    with ExitStack() as stack:
        os.environ.setdefault("SDD_MIRROR", str(STATE / "mirror"))
        os.environ.setdefault("SDD_HOME", str(Path(__file__).parents[1]))  # where workers find the code
        direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "127.0.0.1").split(",")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*direct, "127.0.0.1"]))
        if "SDD_STORE" not in os.environ:
            for name in FOREIGN_S3:
                os.environ.pop(name, None)
            os.environ.update(stack.enter_context(_s3()))
        if prefect:
            for name, value in PREFECT_SETTINGS.items():
                os.environ.setdefault(name, value)
            api = os.environ.get("PREFECT_API_URL")
            if not api:
                os.environ.update(stack.enter_context(_prefect()))
            elif not _answers(f"{api}/health"):
                raise ConfigError(
                    f"PREFECT_API_URL={api}: no Prefect server answers there; start it, or unset the variable"
                )
            from prefect import tags  # not on the path of a plan
            from prefect.context import refresh_global_settings_context

            refresh_global_settings_context()
            stack.enter_context(tags("sdd"))  # what the automations watch
            stack.callback(_send_what_is_queued)
        yield


def _send_what_is_queued() -> None:
    """Log lines and events must reach the server before it stops, or the interpreter's exit waits for it in vain."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


@contextmanager
def _s3() -> Iterator[dict[str, str]]:
    """SeaweedFS with generated credentials; yields the variables that make it the store."""
    folder = STATE / "s3"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    identities = folder / "identities.json"
    if not identities.exists():
        credentials = [{"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}]
        identities.touch(mode=0o600)
        identities.write_text(
            json.dumps({"identities": [{"name": "sdd", "credentials": credentials, "actions": ["Admin"]}]})
        )
    credentials = json.loads(identities.read_text())["identities"][0]["credentials"]

    def command(port: int) -> list[str]:
        ports = {name: _free_port() for name in S3_PORTS}
        grpc = {f"{name}.grpc": _free_port() for name in S3_PORTS if not name.endswith("grpc")}
        return [
            _tool("weed"), "mini", f"-dir={folder / 'data'}", f"-s3.config={identities}", f"-s3.port={port}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={free}" for name, free in (ports | grpc).items()),
        ]  # fmt: skip

    limits = {"GOMEMLIMIT": "350MiB", "GOGC": "50"}  # keeps the server at about 230 MB
    with _service("s3", command, port=8333, health="/healthz", extra=limits) as url:
        yield {
            "SDD_STORE": "s3://sdd/artifacts",
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": credentials[0]["accessKey"],
            "AWS_SECRET_ACCESS_KEY": credentials[0]["secretKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def _prefect() -> Iterator[dict[str, str]]:
    """A Prefect server on SQLite; yields the variable that makes it the API."""
    (STATE / "prefect").mkdir(parents=True, exist_ok=True)

    def command(port: int) -> list[str]:
        ui = f"PREFECT_UI_URL=http://127.0.0.1:{port}"  # for the links in notifications
        return ["env", ui, _tool("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]

    with _service("prefect", command, port=4200, health="/api/health", extra=PREFECT_SETTINGS) as url:
        yield {"PREFECT_API_URL": f"{url}/api"}


@contextmanager
def _service(
    name: str, command: Callable[[int], list[str]], *, port: int, health: str, extra: dict[str, str]
) -> Iterator[str]:
    """Share one process of this name between all runs of this checkout; yields its URL.

    Every user holds a shared lock while it works; whoever then gets that lock exclusively is the last.
    """
    record = STATE / name / "server.json"
    with (STATE / name / "users.lock").open("w") as users, (STATE / name / "change.lock").open("w") as change:
        fcntl.flock(change, fcntl.LOCK_EX)
        running = json.loads(record.read_text()) if record.exists() else None
        if not running or not _still_runs(running) or not _answers(running["url"] + health):
            running = _start(name, command, port, health, extra)
            record.write_text(json.dumps(running))
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(change, fcntl.LOCK_UN)
        try:
            yield running["url"]
        finally:
            fcntl.flock(change, fcntl.LOCK_EX)
            with suppress(BlockingIOError, FileNotFoundError):  # others use it; its folder was removed
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another user may have started a new one meanwhile, since this one's was gone.
                _stop(json.loads(record.read_text())["pid"])
                record.unlink()


def _start(
    name: str, command: Callable[[int], list[str]], preferred: int, health: str, extra: dict[str, str]
) -> dict[str, Any]:
    log = STATE / name / "server.log"
    for _ in range(START_TRIES):  # a port that was free when it was chosen may be another's by the time it is opened
        port = preferred if _is_free(preferred) else _free_port()
        url, before = f"http://127.0.0.1:{port}", log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(port), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=os.environ | extra, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + STARTUP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if _answers(url + health):
                return {"pid": process.pid, "url": url}
            time.sleep(0.1)
        process.kill()
        process.wait()
    said, _, _ = log.read_bytes()[before:].decode(errors="replace").partition("\ngoroutine ")  # Go's dump of threads
    raise PipelineError(f"the {name} server did not start at {url}; end of {log}:\n{said[-500:]}")


def _stop(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGTERM)
        for _ in range(100):
            if _is_gone(pid):
                return
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _is_gone(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
    except ChildProcessError:  # started by another run
        pass
    os.kill(pid, 0)
    return False


def _still_runs(server: dict[str, Any]) -> bool:
    """Whether the process of a record lives; when it was killed, its number and its port may be others' by now."""
    try:
        command = Path(f"/proc/{server['pid']}/cmdline").read_text()
    except OSError:
        return False
    return server["url"].rsplit(":", 1)[1] in command


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tool(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


def main() -> int:
    with environment(prefect=True):
        ui = os.environ["PREFECT_API_URL"].removesuffix("/api")
        if command := sys.argv[1:]:
            return _run([_tool(command[0]) if command[0] in ("prefect", "python") else command[0], *command[1:]])
        print(f"Prefect UI: {ui}   S3: {os.environ.get('AWS_ENDPOINT_URL', 'AWS')}   Ctrl-C stops both", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()
    return 0


def _run(command: list[str]) -> int:
    """The command's exit status; signals to this process are the command's."""

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):  # before it starts: it must not inherit a shell's ignored SIGINT
        signal.signal(number, forward)
    process = subprocess.Popen(command)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
