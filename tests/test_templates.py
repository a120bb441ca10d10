"""Templates: what they may reach, and one line that names key, row and columns when they fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_core.data.templates import template
from cola_core.errors import UserError

ROW = {"text": "A film", "label": 1, "a b": "odd", "gone": None, "target": {"word": "it"}}
WRONG = {
    "{{ txt }}": "data.tsv:7: prepare.prompt: no column 'txt'; did you mean 'text'? columns: text, label",
    "{{ zzzz }}": "data.tsv:7: prepare.prompt: no column 'zzzz'; allowed: text, label",
    "{{ gone }}": "data.tsv:7: prepare.prompt: column 'gone' is null here",
    "{{ target.wrd }}": "data.tsv:7: prepare.prompt: 'dict object' has no attribute 'wrd'",
    "{{ text + 1 }}": "data.tsv:7: prepare.prompt: fails on this row",
    "{{ 1 // 0 }}": "data.tsv:7: prepare.prompt: fails on this row",
    "{{ text.__class__.__mro__ }}": "unsafe",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ target.update({'word': 'x'}) }}": "unsafe",
    "{% include '/etc/passwd' %}": "fails on this row",
    "{{ text": "params.yaml: prepare.prompt: line 1 of the template",
    "{{ text | lowr }}": "params.yaml: prepare.prompt: line 1 of the template: No filter named 'lowr'",
}


@pytest.mark.parametrize("source", WRONG)
def test_a_failure_is_one_line(source: str) -> None:
    with pytest.raises(UserError) as caught:
        template("prepare.prompt", source).render(ROW, "data.tsv:7")
    assert WRONG[source] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ROW["target"] == {"word": "it"}


def test_render() -> None:
    def text(source: str) -> str:
        return template("prepare.prompt", source).render(ROW, "data.tsv:7")

    assert text("{{ text }}\n") == "A film\n"  # the last newline is part of MeZO's prompts
    assert text('{{ row["a b"] }} {{ target.word | upper }} {{ label == 1 }}') == "odd IT True"
    assert text("{{ gone or 'nothing' }} <&>") == "nothing <&>"
    assert text("{{ '' if nope is defined else text }}") == "A film"


def test_columns_are_those_the_template_reads() -> None:
    assert template("prepare.prompt", "{{ text | lower }}{{ target.word }}").columns(ROW) == ["text", "target"]
    assert template("prepare.prompt", '{{ row["a b"] }}').columns(ROW) == list(ROW)


@given(st.text())
def test_text_of_a_column_is_never_a_template(text: str) -> None:
    assert template("prepare.prompt", "<{{ text }}>").render({"text": text}, "x") == f"<{text}>"
    assert template("prepare.prompt", "{{ text }}").render({"text": "{{ 7 * 7 }}"}, "x") == "{{ 7 * 7 }}"
