"""Templates and expressions cannot reach Python, run for ever or fill the memory; honest ones lose nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cola_core.config.task import PrepareConfig
from cola_core.data.comparison import comparable
from cola_core.data.templates import template
from cola_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

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
