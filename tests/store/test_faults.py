"""What goes wrong really goes wrong here: killed publishers, a server that dies, throttles, or cuts bodies short."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec import get_filesystem_class

from deployments import local
from tasks.domain.errors import ConfigError
from tasks.store.artifacts import LEASE, MANIFEST, ArtifactStore, Manifest, Quarantined
from tasks.store.housekeeping import faults, manifests
from tasks.store.mirror import sha256_of
from tasks.store.parts import Parts
from tests.conftest import ROOT, enlarge
from tests.store.conftest import FILES, contents, objects, produced, stage

MB = 2**20
SLOW_SECONDS = 0.1  # until a slow server begins to answer
SLOW_BYTES = 1500  # that it takes a second
BIG = {"weights.bin": bytes(range(256)) * (12 * MB // 256), "rows.jsonl": b'{"id": 1}\n'}

# Publishes stage(rows=N), and kills itself with -9 before its N-th step, or ends with 0 where there are fewer.
PUBLISHER = """
import os, pathlib, signal, sys
from tasks.store.artifacts import ArtifactStore
from tests.store.conftest import produced, stage
root, folder, last = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
store, steps = ArtifactStore(root, folder / "mirror"), 0
def step():
    global steps
    steps += 1
    if steps == last:
        os.kill(os.getpid(), signal.SIGKILL)
def audit(event, arguments):
    if event in ("os.link", "os.rename", "os.remove", "os.mkdir", "os.utime"):
        step()
out = produced(folder / "out", {"rows.jsonl": b"of the killed one", "more/x.bin": b"x" * 1000})
if root.startswith("s3://"):
    call = type(store.fs)._call_s3
    async def counted(self, *arguments, **options):
        step()
        return await call(self, *arguments, **options)
    type(store.fs)._call_s3 = counted
else:
    sys.addaudithook(audit)
with store.lease(stage(rows=last)) as lease:
    store.publish(stage(rows=last), out, {}, 0, lease)
"""


def test_a_publisher_killed_at_any_point_leaves_a_whole_artifact_or_none(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its requests (S3) or changes on the disk (folder); a run after it always succeeds."""
    monkeypatch.setattr("tasks.store.lease.LEASE_SECONDS", 0.3)  # what the next run waits for a dead one
    monkeypatch.setattr("tasks.store.lease.POLL_SECONDS", 0.05)
    found = []
    for last in range(1, 60):
        arguments = [store.root, str(tmp_path / f"killed-{last}"), str(last)]
        done = subprocess.run([sys.executable, "-c", PUBLISHER, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        this = stage(rows=last)
        found.append(store.find(this) is not None)
        if found[-1]:
            assert contents(store.fetch(store.manifest_at(store.uri(this))))["rows.jsonl"] == b"of the killed one"
        out = produced(tmp_path / f"after-{last}")
        with store.lease(this) as lease:
            published = store.publish(this, out, {}, 0, lease)
        shutil.rmtree(store.mirror)
        assert contents(store.fetch(published)).keys() == published.files.keys()
        left = {f"{this.address}/{name}" for name in [*published.files, MANIFEST]}
        assert objects(store, this.address) - ({f"{this.address}/{LEASE}"} if found[-1] else set()) == left
    assert done.returncode == 0, "every step was tried"
    assert found.count(False) >= 6 and found == sorted(found), "nothing before the manifest counts, all after it does"


# Publishes stage(rows=1), stage(rows=2), ..., and before the N-th step of the N-th stops itself, as a machine that is
# suspended does. By its own clock it holds its lease all the time.
STOPPED = """
import itertools, os, pathlib, signal, sys
from tasks.store.artifacts import ArtifactStore
from tests.store.conftest import produced, stage
root, folder = sys.argv[1], pathlib.Path(sys.argv[2])
store, steps, last = ArtifactStore(root, folder / "mirror"), 0, 0
def step():
    global steps
    steps += 1
    if steps == last:
        os.kill(os.getpid(), signal.SIGSTOP)
def audit(event, arguments):
    if event in ("os.link", "os.remove", "os.mkdir"):
        step()
if root.startswith("s3://"):
    call = type(store.fs)._call_s3
    async def counted(self, *arguments, **options):
        step()
        return await call(self, *arguments, **options)
    type(store.fs)._call_s3 = counted
else:
    sys.addaudithook(audit)
for number in itertools.count(1):
    this, last = stage(rows=number), 0
    out = produced(folder / str(number), {"rows.jsonl": b"of the stopped one", "more/x.bin": b"x" * 1000})
    with store.lease(this) as lease:
        for name in ("rows.jsonl", "deep/er/weights.bin"):
            store.fs.pipe_file(f"{store.uri(this)}/{name}", b"of an upload that broke off")
        steps, last = 0, number
        facts = store.publish(this, out, {"by": "the stopped one"}, 0, lease).facts
    print(facts["by"], flush=True)
    if steps < last:
        break
"""


def test_a_publisher_stopped_at_any_point_changes_nothing_that_was_made_meanwhile(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of its requests (S3) or changes on the disk (folder), overtaken, and then continued."""
    monkeypatch.setattr("tasks.store.lease.LEASE_SECONDS", 0.3)
    monkeypatch.setattr("tasks.store.lease.POLL_SECONDS", 0.05)
    command = [sys.executable, "-c", STOPPED, store.root, str(tmp_path / "stopped")]
    stopped = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert stopped.stdout
    won = []
    try:
        for number in range(1, 60):
            if not os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1]):
                break
            this = stage(rows=number)
            with store.lease(this) as lease:
                published = store.publish(this, produced(tmp_path / f"other-{number}"), {"by": "other"}, 0, lease)
            os.kill(stopped.pid, signal.SIGCONT)
            won.append(published.facts["by"])
            assert stopped.stdout.readline() == f"{won[-1]}\n", "both return the one that stands"
            assert store.find(this) == published
            assert [*faults(store, published)] == [], number
        assert stopped.stdout.read() == "the stopped one\n", "every step was tried"
        assert won.count("other") >= 6 and won == sorted(won)
    finally:
        stopped.kill()


class Server:
    """A SeaweedFS of this test's own, that can be killed and started again at the same address."""

    def __init__(self, pid: int, url: str) -> None:
        self.pid, self.url = pid, url
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
        self.command = [part.decode() for part in command]
        self.process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        if self.process:
            self.process.wait()
        else:
            os.waitpid(self.pid, 0)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.pid = self.process.pid
        healthy = threading.Event()
        while not local._answers(f"{self.url}/healthz"):
            healthy.wait(0.1)
            assert self.process.poll() is None, shlex.join(self.command)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(local, "STATE", tmp_path / "state")
    get_filesystem_class("s3").clear_instance_cache()
    with local._s3() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        server = Server(**json.loads((tmp_path / "state" / "s3" / "server.json").read_text()))
        yield server
        if server.process:  # `_s3` stops the one that it started itself
            server.kill()
    get_filesystem_class("s3").clear_instance_cache()


def small_parts(monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A store on the current server whose parts are so small that a test's file has several."""
    for name in ("CHUNK", "DOWNLOAD_CHUNK"):
        monkeypatch.setattr(f"tasks.store.artifacts.{name}", 5 * MB)
    monkeypatch.setattr("tasks.store.artifacts.LONGEST_PAUSE", 0.5)
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", Path(os.environ["SDD_MIRROR"]))
    assert store.fs.default_block_size == 5 * MB
    return store


def in_the_middle_of(store: ArtifactStore, request: str, action: Callable[[], None]) -> list[str]:
    """Run `action` once, before the second `request` that the client sends."""
    call, seen = store.fs._call_s3, list[str]()

    async def watched(method: str, *arguments: Any, **options: Any) -> Any:
        if method == request:
            seen.append(method)
            if len(seen) == 2:
                action()
        return await call(method, *arguments, **options)

    store.fs._call_s3 = watched
    return seen


def test_an_upload_survives_a_server_that_is_killed_and_started_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    store = small_parts(monkeypatch)
    put, tries = store._put, list[str]()

    def restarted_after_the_first_failure(source: Path, path: str, *rest: Any) -> bool:
        tries.append(path)
        if len(tries) == 3:  # rows.jsonl; weights.bin, which fails; this
            server.start()
        return put(source, path, *rest)

    monkeypatch.setattr(store, "_put", restarted_after_the_first_failure)
    with store.lease(stage()) as lease:
        in_the_middle_of(store, "upload_part", server.kill)
        published = store.publish(stage(), produced(tmp_path / "out", BIG), {}, 0, lease)
    assert [path.rsplit("/", 1)[1] for path in tries[:3]] == ["rows.jsonl", "weights.bin", "weights.bin"]
    reader = ArtifactStore(store.root, tmp_path / "reader")
    assert contents(reader.fetch(published)) == BIG
    assert not store.fs.exists(f"{store.uri(stage())}/{LEASE}")


def test_a_download_survives_a_server_that_is_killed_and_started_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDD_MIRROR", str(tmp_path / "mirror"))
    store = small_parts(monkeypatch)
    published = store.publish(stage(), produced(tmp_path / "out", {"weights.bin": BIG["weights.bin"]}), {}, 0)
    reader = ArtifactStore(store.root, tmp_path / "reader")
    get, tries = reader._get, list[str]()

    def restarted_after_the_first_failure(path: str, *rest: Any) -> None:
        tries.append(path)
        if len(tries) == 2:
            server.start()
        get(path, *rest)

    monkeypatch.setattr(reader, "_get", restarted_after_the_first_failure)
    in_the_middle_of(reader, "get_object", server.kill)
    assert contents(reader.fetch(published)) == {"weights.bin": BIG["weights.bin"]}
    assert len(tries) >= 2


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the S3 server; `fault` names what happens to one instead."""

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        if fault == "expired":
            text = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            return self.reply(400, {"Content-Type": "application/xml"}, text)
        if fault == "throttled":
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return self.reply(503, {"Content-Type": "application/xml"}, text)
        if fault == "slow":
            time.sleep(SLOW_SECONDS + len(body) / SLOW_BYTES)
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        got = upstream.getresponse()
        content = got.read()
        headers = {name: value for name, value in got.getheaders() if not name.lower().startswith("transfer-")}
        if fault == "answer lost":
            self.close_connection = True
            return None
        if fault == "cut short, as if it were all":
            headers = {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-checksum")}
            content = content[: len(content) // 2]
            headers["Content-Length"] = str(len(content))
        if fault == "broken off":
            content = content[: len(content) // 2]
            self.close_connection = True
        return self.reply(got.status, headers, content, pieces=4 if fault == "slow" else 1)

    def reply(self, status: int, headers: dict[str, str], content: bytes, pieces: int = 1) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        size = len(content) // pieces + 1
        for start in range(0, len(content), size):
            time.sleep(SLOW_SECONDS / 4 if start else 0)
            self.wfile.write(content[start : start + size])

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def proxy(stack: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    get_filesystem_class("s3").clear_instance_cache()
    with Proxy(stack["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
    get_filesystem_class("s3").clear_instance_cache()


def first(count: int, method: str, ending: str, fault: str) -> tuple[Callable[[str, str], str | None], list[str]]:
    """A fault for the first `count` requests of an object, and the list in which they are counted."""
    seen: list[str] = []

    def decide(command: str, path: str) -> str | None:
        if command == method and path.split("?")[0].endswith(ending) and len(seen) < count:
            seen.append(path)
            return fault
        return None

    return decide, seen


@pytest.mark.parametrize("ending", ["rows.jsonl", MANIFEST, LEASE])
def test_throttling_is_waited_out(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """More refusals than the ten tries that the client library makes by itself."""
    monkeypatch.setattr("tasks.store.artifacts.LONGEST_PAUSE", 0.1)
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    proxy.fault, refused = first(11, "PUT", ending, "throttled")
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert len(refused) == 11
    proxy.fault, refused = first(11, "GET", "rows.jsonl", "throttled")
    assert contents(ArtifactStore(store.root, tmp_path / "reader").fetch(published)) == FILES
    assert len(refused) == 11


def test_a_slow_server_costs_time_and_nothing_else(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file takes longer than a lease without a heartbeat lasts, while a second run waits to take it over."""
    monkeypatch.setattr("tasks.store.lease.LEASE_SECONDS", 3.0)
    monkeypatch.setattr("tasks.store.lease.POLL_SECONDS", 0.05)
    root, seen, made = f"s3://sdd/{uuid4().hex}", list[tuple[str, str]](), list[str]()

    def slow(method: str, path: str) -> str:
        seen.append((method, path.split("?")[0].removeprefix(root.removeprefix("s3:/") + "/")))
        return "slow"

    def publish(by: str) -> Manifest:
        store = ArtifactStore(root, tmp_path / by)
        with store.lease(stage()) as lease:
            if standing := store.find(stage()):
                return standing
            made.append(by)
            assert made == [by], "a living holder's lease was taken over"
            return store.publish(stage(), produced(tmp_path / f"{by}-out"), {"by": by}, 0, lease)

    with ArtifactStore(root, tmp_path / "first").lease(stage()):  # makes the bucket
        pass
    proxy.fault = slow
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(publish, ("one", "two"))
    assert first == second and first.facts == {"by": made[0]}
    for name in [*FILES, MANIFEST]:
        assert seen.count(("PUT", f"{stage().address}/{name}")) == 1, f"{name} was sent more than once"
    seen.clear()
    reader = ArtifactStore(root, tmp_path / "reader")
    assert contents(reader.fetch(first)) == FILES
    assert [method for method, path in seen if path.endswith("weights.bin")].count("GET") == 1
    assert objects(reader) == {f"{stage().address}/{name}" for name in [*FILES, MANIFEST]}
    assert [*faults(reader, first)] == []


@pytest.mark.parametrize("ending", ["rows.jsonl", MANIFEST, LEASE])
def test_a_write_whose_answer_is_lost_is_done_again_or_recognised(proxy: Proxy, tmp_path: Path, ending: str) -> None:
    """The repeated request meets its own first try, which was carried out."""
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    with store.lease(stage()):  # makes the bucket
        pass
    proxy.fault, lost = first(1, "PUT", ending, "answer lost")
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    assert lost
    assert [*faults(store, published)] == []
    assert objects(store) == {f"{stage().address}/{name}" for name in [*FILES, MANIFEST]}


def test_expired_credentials_are_named_at_once_and_cost_the_store_nothing(proxy: Proxy, tmp_path: Path) -> None:
    store, out = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror"), produced(tmp_path / "out")
    with store.lease(stage()):  # makes the bucket
        pass
    proxy.fault, refused = first(1000, "PUT", "rows.jsonl", "expired")
    with pytest.raises(ConfigError, match=r"refuses the credentials .* renew them if they have expired"):
        store.publish(stage(), out, {}, 0)
    assert refused and store.find(stage()) is None
    proxy.fault = lambda method, path: None
    published = store.publish(stage(), out, {}, 0)
    reader = ArtifactStore(store.root, tmp_path / "reader")
    proxy.fault, refused = first(1000, "GET", "rows.jsonl", "expired")
    with pytest.raises(ConfigError, match="renew them if they have expired"):
        reader.obtain(stage())
    assert refused and not objects(store, "quarantine")
    proxy.fault = lambda method, path: None
    assert reader.obtain(stage()) == published and contents(reader.fetch(published)) == FILES


@pytest.mark.parametrize("fault", ["cut short, as if it were all", "broken off"])
def test_a_body_cut_short_on_its_way_condemns_no_artifact(proxy: Proxy, tmp_path: Path, fault: str) -> None:
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    proxy.fault, cut = first(1, "GET", "weights.bin", fault)
    reader = ArtifactStore(store.root, tmp_path / "reader")
    assert contents(reader.fetch(published)) == FILES
    assert cut
    assert store.find(stage()) == published and not objects(store, "quarantine")


def test_a_body_that_is_always_cut_short_is_never_used(proxy: Proxy, tmp_path: Path) -> None:
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    published = store.publish(stage(), produced(tmp_path / "out"), {}, 0)
    proxy.fault, _ = first(1000, "GET", "weights.bin", "cut short, as if it were all")
    reader = ArtifactStore(store.root, tmp_path / "reader")
    with pytest.raises(Quarantined, match=r"weights\.bin"):
        reader.fetch(published)
    assert not [path for path in reader.mirror.rglob("*") if path.is_file()]


def test_pieces_of_a_stage_wait_throttling_out_and_are_taken_whole_or_not_at_all(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.artifacts.LONGEST_PAUSE", 0.1)
    store, rows = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror"), "a row\n" * 1000
    with store.lease(stage()):  # makes the bucket
        pass
    pieces = Parts(store, "distil", ["a.jsonl"])
    (pieces.folder / "a.jsonl").write_text(rows)
    digest = sha256_of(pieces.folder / "a.jsonl")
    proxy.fault, refused = first(11, "PUT", digest, "throttled")
    pieces.commit()
    assert len(refused) == 11
    for count, fault, found in (
        (11, "throttled", [rows]), (1, "cut short, as if it were all", [rows]), (1, "broken off", [rows]),
        (1000, "cut short, as if it were all", []),
    ):  # fmt: skip
        proxy.fault, seen = first(count, "GET", digest, fault)
        reader = Parts(ArtifactStore(store.root, tmp_path / f"{count} {fault}"), "distil", ["a.jsonl"])
        reader.fetch()
        assert [path.read_text() for path in reader.folder.iterdir()] == found
        assert len(seen) == count or not found


@pytest.mark.parametrize("noted", [True, False])
def test_what_a_plan_asks_for_does_not_grow_with_the_artifacts(proxy: Proxy, tmp_path: Path, noted: bool) -> None:
    """Which one is the newest, and its manifest; without the note a listing, whose pages hold a thousand objects."""
    counts: list[int] = []
    store = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror")
    for number in range(4):
        store.publish(stage(rows=number), produced(tmp_path / str(number)), {}, 0)
        if not noted:
            store.fs.rm_file(f"{store.root}/newest/rows")
        reader, seen = ArtifactStore(store.root, tmp_path / "reader"), list[str]()
        proxy.fault = lambda method, path, seen=seen: seen.append(method)  # type: ignore[misc]  # of the default
        changes = reader.newest_change(stage(rows=9))
        assert changes and (not noted or changes == [f"recipe.rows: {number} -> 9"])
        proxy.fault = lambda method, path: None
        counts.append(len(seen))
    assert counts == [counts[0]] * 4 and counts[0] <= 6


def test_a_list_of_artifacts_costs_one_request_for_each(proxy: Proxy, tmp_path: Path) -> None:
    store, seen = ArtifactStore(f"s3://sdd/{uuid4().hex}", tmp_path / "mirror"), list[str]()
    published = [store.publish(stage(rows=n), produced(tmp_path / str(n)), {}, 0) for n in range(4)]
    proxy.fault = lambda method, path: seen.append(method)
    found = dict(manifests(store, [manifest.address for manifest in published]))
    assert found == {manifest.address: manifest for manifest in published}
    assert seen == ["GET"] * 4


def test_the_newest_artifact_is_found_whatever_its_note_says(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(stage(rows=1), produced(tmp_path / "out"), {}, 0)
    for note in (b"rows/gone-0123456789ab", b"other/stage-0123456789ab", b"", b"\xff", b"rows/../../x"):
        store.fs.pipe_file(f"{store.root}/newest/rows", note)
        reader = ArtifactStore(store.root, tmp_path / "reader")
        assert reader.newest_change(stage(rows=9)) == ["recipe.rows: 1 -> 9"]


LARGE = {"weights.bin": bytes(range(256)) * (3 * MB // 256), "rows.jsonl": b'{"id": 1}\n'}


def test_a_full_disk_is_named_and_costs_the_artifact_nothing(
    store: ArtifactStore, tmp_path: Path, small_disk: Path
) -> None:
    published = store.publish(stage(), produced(tmp_path / "out", LARGE), {}, 0)
    reader = ArtifactStore(store.root, small_disk / "mirror")
    with pytest.raises(ConfigError, match=rf"no space left on the disk of SDD_MIRROR, in {small_disk}/mirror \(\d MB"):
        reader.obtain(stage())
    assert store.find(stage()) == published and not objects(store, "quarantine")
    assert not [path for path in small_disk.rglob("*") if path.is_file()], "what was half there makes room"
    enlarge(small_disk)
    assert reader.obtain(stage()) == published and contents(reader.fetch(published)) == LARGE


def test_a_stage_that_fills_the_disk_publishes_nothing(store: ArtifactStore, small_disk: Path) -> None:
    writer = ArtifactStore(store.root, small_disk / "mirror")

    def make() -> None:
        with writer.lease(stage()) as lease, writer.staging() as folder:
            writer.publish(stage(), produced(folder, LARGE), {}, 0, lease)

    with pytest.raises(
        ConfigError, match=rf"the disk of SDD_MIRROR, in {small_disk}/mirror .* free some, lower SDD_MI"
    ):
        make()
    assert not objects(store)
    enlarge(small_disk)
    make()
    assert contents(writer.fetch(writer.manifest_at(writer.uri(stage())))) == LARGE


def test_a_full_folder_store_is_named(tmp_path: Path, small_disk: Path) -> None:
    store = ArtifactStore(f"file://{small_disk}/store", tmp_path / "mirror")
    with pytest.raises(ConfigError, match=rf"no space left on the disk of SDD_STORE, in {small_disk}/store"):
        store.publish(stage(), produced(tmp_path / "out", LARGE), {}, 0)
    assert store.find(stage()) is None
    enlarge(small_disk)
    published = store.publish(stage(), produced(tmp_path / "again", LARGE), {}, 0)
    assert [*faults(store, published)] == []
