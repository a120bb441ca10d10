"""Commands of `cola` that compare models: a study of recipes, and the gate between challenger and champion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cola_core.config.params import Params

__all__ = ["comparing"]

comparing = typer.Typer()

Registered = Annotated[
    str | None, typer.Argument(help="Registered model; by default register.name of params.yaml.", show_default=False)
]


@comparing.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's file, such as studies/main.yaml.")],
    budget: Annotated[float | None, typer.Option(metavar="HOURS", help="Start no cell after so long.", min=0)] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing, write the report alone.")] = False,
    register: Annotated[bool, typer.Option("--register", help="Register the best chain of every task.")] = False,
) -> None:
    """Run what is missing of a study - recipes, tasks, learning rates, seeds - and write its report."""
    if register:
        from flows.start import register_winners

        return register_winners(file)
    if not report:
        from flows.start import start_study

        return start_study(file, budget)
    from cola_core.study.design import read_design
    from flows.child import quiet
    from flows.snapshot import checkout

    quiet()
    from flows.study.orders import planning
    from flows.study.writing import write_report

    with planning(read_design(file), checkout()) as orders:
        print(f"written: {write_report(orders, checkout())}")
    return None


@comparing.command()
def promote(name: Registered = None) -> None:
    """Judge the challenger on the champion's test rows, once, and make it champion if it is shown to be better."""
    from flows.gate import judge_challenger, lines

    params = _params()
    for line in lines(judge_challenger(params, name or params.registry.name)):
        print(line)


@comparing.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept with the version that loses the name.")],
    name: Registered = None,
) -> None:
    """Make the champion before this one champion again."""
    from flows.gate import return_champion

    print(return_champion(name or _params().registry.name, reason))


def _params() -> Params:
    """params.yaml of the checkout, checked."""
    from cola_core.config.params import check_params
    from cola_core.config.reading import read_yaml
    from flows.snapshot import checkout

    return check_params(read_yaml(checkout() / "params.yaml"))
