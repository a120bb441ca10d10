"""All sections of a report, in order; what they show is said by whoever read them."""

from __future__ import annotations

from collections.abc import Iterator

from cola_core.study.report.behaviour import cells, chain, cost, ranks
from cola_core.study.report.blocks import Block, Heading, Text
from cola_core.study.report.checks import firm
from cola_core.study.report.findings import Findings
from cola_core.study.report.outcomes import accuracy, along, examples, loss
from cola_core.study.report.rates import robust
from cola_core.study.report.setting import set_up, sight

__all__ = ["report"]


def report(findings: Findings, said: str) -> Iterator[Block]:
    """All blocks, in order.

    Args:
        said: what a person concludes, as Markdown; empty before anybody did.
    """
    design = findings.design
    yield Heading(design.title, 1)
    yield Text(design.question)
    yield from _said(said)
    yield Heading("What was expected")
    yield Text(design.expected)
    yield from set_up(findings)
    if design.seeds:
        yield from sight(findings)
    for section in (accuracy, firm, loss, examples, along, robust, chain, ranks, cost) if findings.tests else (robust,):
        yield from section(findings)
    yield from cells(findings)


def _said(text: str) -> Iterator[Block]:
    """A person's Markdown: `## headings` and paragraphs."""
    for part in text.strip().split("\n\n"):
        level = len(part) - len(part.lstrip("#"))
        yield Heading(part[level:].strip(), max(2, level)) if level else Text(part)
