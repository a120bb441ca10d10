"""Nobody in: no pickle, no network, servers on loopback, no secret out, hostile archives and templates refused."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import miniature
import pytest
import yaml
from test_assets import params_for

from cola_core.assets.references import opened
from cola_core.assets.wheels import extract
from cola_core.config.task import PrepareConfig
from cola_core.data.comparison import comparable
from cola_core.data.templates import template
from cola_core.errors import UserError
from cola_core.files import tree_hash
from tasks.context import Context, Done
from tasks.records import record
from tests.watched import CANARY, TOLD, WATCH, Watched, namespace, watch, watched_variables

ROOT = Path(__file__).resolve().parents[1]

PATIENT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "200"}

# 1, 2, 7: what runs, watched, in a namespace of its own


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """`cola run` of the miniature, with Prefect's own temporary server."""
    folder = tmp_path_factory.mktemp("flow")
    root = miniature.make(folder)
    settings = miniature.variables(root, PREFECT_HOME=str(folder / "prefect"), **PATIENT)
    return watch(folder, root, settings, "flows.cli", "run")


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("import pickle; pickle.loads(pickle.dumps(1))", "pickle.loads by __main__"),
        ("import pickle, io; pickle.load(io.BytesIO(pickle.dumps(1)))", "pickle.load by __main__"),
        ("import pickle, io; pickle.Unpickler(io.BytesIO(pickle.dumps(1))).load()", "Unpickler.load by __main__"),
        ("import pickle, io; pickle._Unpickler(io.BytesIO(pickle.dumps(1))).load()", "_Unpickler.load by __main__"),
        ("import _pickle, pickle; _pickle.loads(pickle.dumps(int))", "find_class builtins.int by __main__"),
        ("import joblib; joblib.load('x')", "joblib.load by __main__"),
        ("import numpy; numpy.load('x', allow_pickle=True)", "numpy.load by __main__"),
        ("import torch; torch.load('x', weights_only=True)", "torch.load by __main__"),
        ("import socket; socket.create_connection(('203.0.113.1', 80), 0.1)", "left socket.connect 203.0.113.1"),
        ("import urllib.request; urllib.request.urlopen('http://example.org')", "left socket.getaddrinfo example.org"),
    ],
)
def test_the_watch_sees(tmp_path: Path, program: str, what: str) -> None:
    """The canary: without this the runs below would prove nothing."""
    settings = watched_variables(tmp_path, {**os.environ, "PYTHONPATH": "."})
    command = [*namespace(), sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    notes = (tmp_path / "watch.log").read_text()
    assert done.returncode and what in notes and "active -c" in notes, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_dag_unpickles_nothing_and_needs_no_network(finished: Watched) -> None:
    namespace()
    assert finished.code == 0, finished.told
    assert finished.stopped() == [] and not [note for note in finished.notes if note.startswith("unpickled")]
    ran = {name.split()[1] for name in finished.processes() if name.startswith("-m tasks.")}
    stages = {"fetch", "prepare", "head", "profile", "allocate", "link", "merge", "evaluate", "evaluate_base"}
    assert ran == {f"tasks.{stage}" for stage in stages | {"register"}}
    assert finished.ports == [], "no stage listens"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_flow_unpickles_nothing_needs_no_network_and_listens_on_loopback(flow: Watched) -> None:
    namespace()
    assert flow.code == 0, flow.told
    assert flow.stopped() == []
    assert "-m tasks.register" in flow.processes() and flow.ports
    assert all(loopback(port) for port in flow.ports)


def loopback(address: str) -> bool:
    """Whether an address of /proc/net/tcp or tcp6 is 127.0.0.0/8 or ::1."""
    host = address.split(":")[0]
    return host[-2:] == "7F" if len(host) == 8 else host in ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cola_ui_listens_on_loopback_and_its_command_lines_tell_nothing(tmp_path: Path) -> None:
    root = miniature.make(tmp_path)
    store = f"sqlite:///file:{tmp_path}/mlflow.db?uri=true&api_key={CANARY}"  # with a secret that SQLite overlooks
    settings = watched_variables(tmp_path, miniature.variables(root, PREFECT_HOME=str(tmp_path / "prefect")))
    ports, script = tmp_path / "ports.json", str(WATCH / "loopback.py")
    line = [*namespace(), sys.executable, script, str(ports), sys.executable, "-m", "flows.cli", "ui"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            line, cwd=root, env={**settings, "MLFLOW_BACKEND_STORE_URI": "", "MLFLOW_TRACKING_URI": store},
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        lines = until_both_listen(process)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child_of(process.pid), signal.SIGTERM)
        process.wait(180)
    seen = json.loads(ports.read_text())
    assert {int(port.split(":")[1], 16) for port in seen} >= {5001, 4200} and all(loopback(port) for port in seen)
    assert any("mlflow" in line for line in lines) and not [line for line in lines if CANARY in line]
    assert not [line for line in lines if "mlflow.server.jobs" in line or "--workers 4" in line], "for one person?"
    assert CANARY not in (tmp_path / "out").read_text()


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def until_both_listen(process: subprocess.Popen[Any]) -> set[str]:
    """The command lines of every process of the namespace, until both servers wait for connections."""
    lines: set[str] = set()
    limit = time.monotonic() + 400
    while time.monotonic() < limit and process.poll() is None:
        text = ""
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/net/tcp").read_text()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str((entry / "ns" / "net").readlink()) == str(Path(f"/proc/{process.pid}/ns/net").readlink()):
                    lines.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        if f":{5001:04X} 00000000:0000 0A" in text and f":{4200:04X} 00000000:0000 0A" in text:
            return lines
        time.sleep(0.1)
    raise AssertionError("a server did not start")


# 3: secrets


def leaks(folder: Path, *but: str) -> list[str]:
    """Files below `folder` that hold the canary."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_whole_run_and_a_flow_leave_no_secret_of_their_environment(finished: Watched, flow: Watched) -> None:
    for run in (finished, flow):
        assert CANARY not in run.told and leaks(Path(run.root).parent) == []
    root = Path(finished.root)
    assert (root / "mlflow.db").stat().st_size > 100_000 and list((root / ".cola/records").iterdir())


def stage_with(
    folder: Path, change: Callable[[dict[str, Any]], Any], **variables: str
) -> subprocess.CompletedProcess[str]:
    """The real stage fetch in `folder` with parameters that `change` has spoilt."""
    params = params_for(folder, "path:rows.csv")
    (folder / "rows.csv").write_text("a\n1\n")
    change(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    settings = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "COLA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "tasks.fetch"]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)


def asset(name: str, sha256: str | None = None) -> Callable[[dict[str, Any]], Any]:
    return lambda params: params["fetch"]["data"]["train"].update(asset=name, sha256=sha256)


PIP = {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", **TOLD}
STAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, str], int, str]] = {
    "pip": (asset("pypi:tiny-data==1.0/x", "0" * 64), PIP, 75, "no package index can be reached"),
    "pip, a wrong address": (
        asset("pypi:tiny-data==1.0/x", "0" * 64), PIP | {"PIP_INDEX_URL": f"htps://me:{CANARY}@host/simple"}, 2, "tiny",
    ),
    "the hub": (
        asset("hub:org/name@main"), {"HF_ENDPOINT": f"http://me:{CANARY}@127.0.0.1:9", "HF_TOKEN": CANARY}, 75, "hub",
    ),
    "a reference": (asset(f"https://me:{CANARY}@host/x.csv"), {}, 2, "fetch.data.train.asset: holds a password"),
    "an unknown key": (lambda params: params["fetch"].update(api_key=CANARY), {}, 2, "fetch.api_key: unknown key"),
    "a wrong value": (lambda params: params["fetch"].update(model={"token": CANARY}), {}, 2, "fetch.model.token: "),
    "a wrong type": (
        lambda params: params["fetch"]["model"].update(sha256={"api_key": CANARY}), {}, 2, "fetch.model.sha256: ",
    ),
    "a name in the way": (lambda params: params.update(seed=f"https://me:{CANARY}@host"), {}, 2, "seed: "),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_tells_no_secret(tmp_path: Path, case: str) -> None:
    change, variables, code, line = STAGES[case]
    done = stage_with(tmp_path, change, **variables)
    assert done.returncode == code and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(tmp_path, "params.yaml") == []


def test_a_failure_told_to_the_flow_holds_no_secret(tmp_path: Path) -> None:
    note = tmp_path / "failure.json"
    stage_with(tmp_path, asset(f"https://me:{CANARY}@host/x.csv"), COLA_FAILURE=str(note))
    assert json.loads(note.read_text())["code"] == 2 and CANARY not in note.read_text()


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.make(tmp_path_factory.mktemp("mini"))


def cola(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = miniature.variables(root, PREFECT_HOME=str(root.parent / "prefect"), **variables)
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.parametrize(
    "override",
    [
        f"fetch.hub_token={CANARY}",
        f"+fetch.hub_token={CANARY}",
        f"fetch.hub_token=[{CANARY} {CANARY}",
        f"fetch.model.asset='https://me:{CANARY}@host/x'",
        f"register.name=@{{x}} https://me:{CANARY}@host",
    ],
)
def test_an_override_tells_no_secret(mini: Path, override: str) -> None:
    done = cola(mini, "flows.cli", "run", "-S", override)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


@pytest.mark.parametrize("words", [["tasks.sync"], ["flows.cli", "sync"]])
def test_a_store_that_is_away_tells_no_password(mini: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("tasks.records.home", lambda: mini / ".cola")
    raw = {"register": {"name": "x"}, "recipe": "r", "task": "t", "seed": 0}
    used = {"fetch": {"hub_token": CANARY, "from": f"https://me:{CANARY}@host"}}
    record(Context("fetch", None, raw, used=used), Done(), time.time())
    done = cola(mini, *words, MLFLOW_TRACKING_URI=f"http://me:{CANARY}@127.0.0.1:9")
    assert done.returncode == 75 and "MLflow at http://***@127.0.0.1:9" in done.stderr, done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


@pytest.mark.slow
def test_a_prefect_server_that_is_away_tells_no_password(mini: Path) -> None:
    address = f"http://me:{CANARY}@127.0.0.1:9/api"
    done = cola(mini, "flows.cli", "run", PREFECT_API_URL=address, PREFECT_CLIENT_MAX_RETRIES="0")
    assert done.returncode and "127.0.0.1:9" in done.stdout + done.stderr
    assert CANARY not in done.stdout + done.stderr and leaks(mini.parent) == []


CRASHES = {
    "a stage": "from tasks.stage import run; run(lambda context: crash())",
    "the command line": "import flows.cli; flows.cli.main = crash; flows.cli.app()",
    "sync": "import tasks.sync; tasks.sync.sync = crash; tasks.sync._main()",
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_traceback_tells_no_secret(tmp_path: Path, where: str) -> None:
    """Whatever a library puts into an error that nobody expected."""
    params_for(tmp_path, "path:rows.csv")
    program = f"import os\ndef crash(): raise OSError('no way to ' + os.environ['ADDRESS'])\n{CRASHES[where]}"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "ADDRESS": f"ftp://me:{CANARY}@host"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OSError: no way to ftp://***@host" in done.stderr, done.stderr
    assert CANARY not in done.stderr and leaks(tmp_path) == []


# 4: archives (test_assets.py has the simple ones)


def packed(*members: tuple[str | zipfile.ZipInfo, bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)

    return make


def garbled(method: int) -> Callable[[Path], None]:
    """An archive of one member whose packed bytes are damaged in their middle."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("pkg/m/a", bytes(range(256)) * 64)
        raw = bytearray(path.read_bytes())
        raw[60:90] = b"\xff" * 30
        path.write_bytes(raw)

    return make


def misspelt(path: Path) -> None:
    """An archive whose member's name says that it is UTF-8, and is not."""
    packed(("pkg/m/\u00e9", b"1"))(path)
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xc3\x28"))


def patched(*changes: tuple[bytes, bytes]) -> Callable[[Path], None]:
    """An archive of one member of 1,024 bytes whose headers then say something else."""

    def make(path: Path) -> None:
        packed(("pkg/m/a", b"\0" * 1024))(path)
        raw = path.read_bytes()
        for old, new in changes:
            assert old in raw
            raw = raw.replace(old, new)
        path.write_bytes(raw)

    return make


def symlink(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


SIZE = struct.pack("<I", 1024)
ARCHIVES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "absolute": (packed(("/etc/x", b"")), "/etc", "leaves its folder"),
    "above": (packed(("../x", b"")), "../x", "leaves its folder"),
    "above, deep": (packed(("pkg/m/a/../../../../x", b"")), "pkg/m", "leaves its folder"),
    "the parent itself": (packed(("..", b"")), "..", "leaves its folder"),
    "the folder itself": (packed((".", b"")), ".", "leaves its folder"),
    "backslashes": (packed(("pkg/m/..\\..\\x", b"")), "pkg/m", "leaves its folder"),
    "a drive": (packed(("C:/x", b"")), "C:", "leaves its folder"),
    "a drive, deep": (packed(("pkg/m/C:x", b"")), "pkg/m", "leaves its folder"),
    "a link": (packed((symlink("pkg/m/x"), b"/etc/passwd")), "pkg/m", "is a link"),
    "a link and what is below it": (packed((symlink("pkg/m"), b"/etc"), ("pkg/m/x", b"")), "pkg/m", "is a link"),
    "twice": (packed(("pkg/m/a", b"1"), ("pkg/m/a", b"2")), "pkg/m", "would be the same file"),
    "twice, by a dot": (packed(("pkg/m/a", b"1"), ("pkg/m/./a", b"2")), "pkg/m", "would be the same file"),
    "twice, by case": (packed(("pkg/m/a", b"1"), ("pkg/m/A", b"2")), "pkg/m", "would be the same file"),
    "twice, by accent": (packed(("pkg/m/\u00e9", b"1"), ("pkg/m/e\u0301", b"2")), "pkg/m", "would be the same file"),
    "a file as folder": (packed(("pkg/m/a", b"1"), ("pkg/m/A/b", b"2")), "pkg/m", "cannot both be"),
    "a bomb": (packed(("pkg/m/a", b"\0" * (1 << 26))), "pkg/m", "are unpacked"),
    "a bomb of many": (packed(*((f"pkg/m/{n}", b"\0" * (1 << 20)) for n in range(32))), "pkg/m", "are unpacked"),
    "a size above the truth": (patched((SIZE, b"\xfe\xff\xff\xff")), "pkg/m", "are unpacked"),
    "a size below the truth": (patched((SIZE, b"\x10\0\0\0")), "pkg/m", "not a whole wheel"),
    "too many": (packed(*((f"pkg/m/{n}", b"") for n in range(10_001))), "pkg/m", "at most 10,000"),
    "too long a name": (packed(("pkg/m/" + "x" * 300, b"")), "pkg/m", "not a whole wheel"),
    "encrypted": (patched((b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")), "pkg/m", "not a whole wheel"),
    "a damaged lzma": (garbled(zipfile.ZIP_LZMA), "pkg/m", "not a whole wheel"),
    "a damaged bzip2": (garbled(zipfile.ZIP_BZIP2), "pkg/m", "not a whole wheel"),
    "a damaged deflate": (garbled(zipfile.ZIP_DEFLATED), "pkg/m", "not a whole wheel"),
    "a name in no alphabet": (misspelt, "pkg/m", "not a whole wheel"),
    "unknown packing": (patched((b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x61\0")), "pkg/m", "not a whole wheel"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_one_line_and_leaves_nothing_outside(tmp_path: Path, case: str) -> None:
    make, inner, line = ARCHIVES[case]
    make(tmp_path / "bad.whl")
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    with pytest.raises(UserError, match=line) as told:
        extract(tmp_path / "bad.whl", inner, out)
    assert "\n" not in str(told.value)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "bad.whl"]
    assert sum(path.stat().st_size for path in outside) <= 1024 and all(out in path.parents for path in outside)


def test_an_honest_archive_with_many_zeros_is_unpacked(tmp_path: Path) -> None:
    packed(("pkg/m/a", b"\0" * (1 << 23)), ("pkg/m/b/c", b"x"))(tmp_path / "good.whl")
    folder = extract(tmp_path / "good.whl", "pkg/m", tmp_path)
    assert (folder / "a").stat().st_size == 1 << 23 and (folder / "b" / "c").read_bytes() == b"x"


# 5: hashes

# The hub could not be reached when these were written, so neither a hash nor a commit of them is known. Fetching one
# prints what to write; SuperGLUE's parquet files lie on a branch that the hub itself makes.
UNPINNED = {
    "hub:HuggingFaceTB/SmolLM2-360M@main",
    *(
        f"hub:datasets/aps/super_glue@refs/convert/parquet/{name}/{part}/0000.parquet"
        for name in ("cb", "multirc", "wic", "wsc.fixed")
        for part in ("train", "validation")
    ),
}


def assets(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "asset" in node:
            yield node
        for inner in node.values():
            yield from assets(inner)


def test_every_asset_of_conf_is_pinned() -> None:
    files = [ROOT / "params.yaml", *(ROOT / "conf").rglob("*.yaml")]
    found = [one for file in files for one in assets(yaml.safe_load(file.read_text()))]
    assert {one["asset"].split(":")[0] for one in found} == {"pypi", "hub", "tiny", "???"}
    loose = set()
    for one in found:
        scheme, name = one["asset"].split(":")[0], one["asset"]
        hashed = one["sha256"] is not None and re.fullmatch("[0-9a-f]{64}", one["sha256"])
        by_commit = scheme == "hub" and re.search("@[0-9a-f]{40}(/|$)", name)
        if scheme in ("pypi", "hub", "path") and not hashed and not by_commit:
            loose.add(name)
    assert loose == UNPINNED


def test_what_is_not_pinned_tells_how_to_pin_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("a\n1\n")
    name = f"path:{tmp_path / 'rows.csv'}"
    with opened(name) as path:
        assert capsys.readouterr().out == f"{name}: not pinned; to pin it, write sha256: {tree_hash(path)}\n"
    with opened(name, tree_hash(tmp_path / "rows.csv")):
        assert capsys.readouterr().out == ""


# 6: templates and expressions

TEMPLATES = {
    "{{ text.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ row | attr('__class__') }}": "unsafe",
    "{{ namespace.__init__.__globals__ }}": "unsafe",
    "{{ range.__init__ }}": "unsafe",
    "{{ self.__init__.__globals__ }}": "unsafe",
    "{{ self._TemplateReference__context }}": "unsafe",
    "{{ '{0.__class__.__init__.__globals__}'.format(text) }}": "unsafe",
    "{{ '{a.__class__.__mro__}'.format_map({'a': text}) }}": "unsafe",
    "{{ ('{0.__class__}' | attr('format'))(text).mro }}": "fails on this row",
    "{{ ['{0.__class__.__mro__}'.format] | map('call', text) | list }}": "No filter named 'call'",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
    "{{ cycler('a') }}": "no column 'cycler'",
    "{{ lipsum.__globals__['os'] }}": "no column 'lipsum'",
    "{{ [1, 2] | random }}": "No filter named 'random'",
    "{{ text.upper }}": "prints a builtin_function_or_method",
    "{{ [text] | map('upper') }}": "prints a generator",
    "{% import 'os' as os %}": "no loader",
    "{% set x = [] %}{{ x.append(1) }}": "unsafe",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ 'a' * 10 ** 9 }}": "more than 1,000,000",
    "{{ 10 ** 9 * [0] }}": "more than 1,000,000",
    "{{ 9 ** (9 ** 9) }}": "a number of more than 10,000 bits",
    "{{ (((((9**64)**64)**64)**64)**64) > 1 }}": "a number of more than 10,000 bits",
    "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}": "10,000 bits",
    "{{ 1 | round(10 ** 9, 'ceil') }}": "a number of more than 10,000 bits",
    "{{ '%999999999d' % 1 }}": "`%` on a text",
    "{{ '{:>999999999}'.format('') }}": "unsafe",
    "{{ '%999999999d' | format(1) }}": "more than 10,000,000",
    "{{ '%*d' | format(999999999, 1) }}": "a width `*`",
    "{{ ('%(a)s' * 1000) | format(a='x' * 100000) }}": "more than 10,000,000",
    "{{ 'x' | center(900000000) }}": "more than 10,000,000",
    "{{ 'x' | indent(900000000) }}": "more than 10,000,000",
    "{{ 'x' | indent(width=900000000) }}": "more than 10,000,000",
    "{{ ('x ' * 100000) | wordwrap(1, wrapstring='y' * 100000) }}": "more than 10,000,000",
    "{{ [1] | batch(900000000, 2) | list }}": "more than 10,000,000",
    "{{ [1] | slice(900000000) | list }}": "more than 10,000,000",
    "{{ {} | tojson(indent=900000000) }}": "unexpected keyword argument 'indent'",
    "{{ 'x'.ljust(900000000) }}": "unsafe",
    "{{ 'x'.rjust(900000000) }}": "unsafe",
    "{{ 'x'.center(900000000) }}": "unsafe",
    "{{ '1'.zfill(900000000) }}": "unsafe",
    "{{ ('x' | attr('zfill'))(900000000) }}": "unsafe",
    "{{ (1).to_bytes(900000000, 'big') | length }}": "unsafe",
    "{% set n = namespace(x='a' * 10 ** 6) %}{% for i in range(10) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "more",
    "{% set n = namespace(x='a' * 10 ** 6) %}{% for i in range(10) %}{% set n.x = n.x + n.x %}{% endfor %}": "more",
    "{% set n = namespace(x=[0] * 10 ** 6) %}{% for i in range(10) %}{% set n.x = n.x + n.x %}{% endfor %}": "more",
    "{% for i in range(10000) %}{{ 'a' * 10 ** 5 }}{% endfor %}": "more than 1,000,000",
    "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 4) }}": "more than 1,000,000",
    "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 4) }}": "more than 1,000,000",
    "{{ range(10 ** 5) | join('b' * 10 ** 4) }}": "more than 1,000,000",
    "{{ ('b' * 10 ** 4).join(['a'] * 10 ** 5) }}": "more than 1,000,000",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "recursion",
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}": "recursion",
}


@pytest.mark.parametrize("source", TEMPLATES, ids=lambda source: source[:40])
def test_a_hostile_template_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match=re.escape(TEMPLATES[source])) as told:
        print(template("prepare.prompt", source).render({"text": "t", "label": 1}, "d:1"))
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


def test_an_honest_template_may_count_repeat_and_loop() -> None:
    source = "{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1.5 * 2 }} {{ '-' * 3 }} {{ 7 % 4 }} {% set n = namespace(x=0) %}"
    source += "{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}"
    assert template("prepare.prompt", source).render({}, "d:1") == "1024 0.5 3.0 --- 3 3"


def test_an_honest_template_may_fill_up() -> None:
    source = "{{ '%.2f' | format(3.14159) }} {{ '%(a)s-%05d' | format(1) if no else 'x' | center(3) }}|"
    source += "{{ 'a\nb' | indent(2) }} {{ 'ab cd' | wordwrap(3) }} {{ [1, 2, 3] | batch(2, 0) | list }} "
    source += "{{ [1, 2, 3] | slice(2) | list }}"
    made = template("prepare.prompt", source).render({"no": False}, "d:1")
    assert made == "3.14  x |a\n  b ab\ncd [[1, 2], [3, 0]] [[1, 2], [3]]"


def test_an_honest_template_may_join_replace_and_round() -> None:
    source = "{{ row.a | join(', ') }} {{ ', '.join(row.a) }} {{ [{'b': 1}, {'b': 2}] | join('-', attribute='b') }} "
    source += "{{ row.c.replace('<br />', '|') }} {{ row.c | replace('x', 'z', 1) }} {{ row.c ~ 1 ~ none }} "
    source += "{{ 3.14159 | round(2) }} {{ 5 | round(-1, 'ceil') }} {{ row.a | tojson }} {{ [1] + [2] }}"
    made = template("prepare.prompt", source).render({"a": ["x", "y"], "c": "x<br />x"}, "d:1")
    assert made == 'x, y x, y 1-2 x|x z<br />x x<br />x1None 3.14 10.0 ["x", "y"] [1, 2]'


@pytest.mark.parametrize("extract", ["(a", "a", "(a{99999999999999999999})", "(" * 5000 + "a" + ")" * 5000])
def test_a_broken_expression_is_a_value_error(extract: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"] | {"extract": extract}
    with pytest.raises(ValueError, match=r"extract\n.*(regular expression|one \(group\))"):
        PrepareConfig.model_validate(values)


BOMBS = ["(a{100000})", "((a{200}){200,300})", "(?x) ((a{200}) { 200 })", "((a{9}b{9}){30}c{99}){99}"]


@pytest.mark.parametrize("extract", BOMBS)
def test_an_expression_that_would_fill_the_memory_is_refused(extract: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"] | {"extract": extract}
    with pytest.raises(ValueError, match=r"extract\n.*not a regular expression of bearable size"):
        PrepareConfig.model_validate(values)


@pytest.mark.parametrize("extract", [r"(\d{1,3}(?:,\d{3}){0,4})\.\d{2}", r"([0-9a-f]{64}) {20}", r"(\p{L}.{0,9999})"])
def test_an_expression_that_counts_is_taken(extract: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["prepare"] | {"extract": extract}
    assert PrepareConfig.model_validate(values).extract == extract


def test_an_expression_without_end_is_stopped_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cola_core.data.comparison.PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"prepare.extract: '\(a\|aa\)\+\$' is still at work"):
        comparable("a" * 80 + "b", "(a|aa)+$")
    assert comparable("so #### 1,200.", r"####\s*([0-9,]+)") == "1200"
