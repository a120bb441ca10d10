"""The command line `cola`: thin commands, each of which imports what it needs when it runs."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cola_core.errors import RetryError, UserError, system_told
from cola_core.secrets import guard
from flows.comparing import comparing

__all__ = ["app", "main"]

cli = typer.Typer(
    name="cola",
    help="Chains of low-rank adapters: plan, run, schedule, look at and hand on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
chain_cli = typer.Typer(help="The trained chain under artifacts/.", no_args_is_help=True)
cli.add_typer(chain_cli, name="chain")
cli.add_typer(comparing)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]


@cli.command()
def plan(
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time one micro-step per machine setting.")] = True,
) -> None:
    """Show which stages would run, what they cost, and the fastest machine setting here."""
    from flows.plan import make_plan
    from flows.snapshot import checkout
    from flows.tables import print_plan

    print_plan(make_plan(checkout(), timed))


@cli.command()
def run(
    method: Annotated[str | None, typer.Option(help="Recipe, from conf/method.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Task, from conf/task.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Base model, from conf/model.", show_default=False)] = None,
    chain: Annotated[str | None, typer.Option(help="Number of links, from conf/chain.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random stream.", show_default=False)] = None,
    overrides: Overrides = None,
    committed: Annotated[bool, typer.Option("--committed", help="Run the last commit, not the files.")] = False,
) -> None:
    """Run the pipeline as a Prefect flow, in a workspace of its own; without options, as params.yaml stands."""
    from flows.start import start

    picks = {"method": method, "task": task, "model": model, "chain": chain}
    start(picks, seed, overrides or [], committed)


@cli.command()
def serve(
    name: Annotated[str, typer.Option(help="Name of the deployment.")] = "local",
    cron: Annotated[str, typer.Option(help="When to run the branch's last commit.")] = "0 2 * * *",
    every: Annotated[float | None, typer.Option(help="Seconds between runs, instead of --cron.", min=1)] = None,
    gate: Annotated[bool, typer.Option("--promote", help="After each run, judge its chain as `cola promote`.")] = False,
) -> None:
    """Offer the flow as a scheduled deployment in Prefect's UI until stopped."""
    from flows.serve import serve as serve_flow

    serve_flow(name, cron, every, gate)


@cli.command()
def ui() -> None:
    """Start MLflow (5001) and Prefect (4200) on loopback, until stopped."""
    from flows.ui import serve_uis

    serve_uis()


@cli.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A data file, or a folder that stage prepare wrote.")],
    rows: Annotated[int, typer.Option(help="Samples to show.", min=0)] = 3,
    task: Annotated[str | None, typer.Option(help="Task, from conf/task.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Base model, from conf/model.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Show rendered samples with what the loss sees, truncations and label balance; without options, by params.yaml."""
    from flows.looks import inspect_path

    for line in inspect_path(path, rows, {"task": task, "model": model}, overrides or []):
        print(line)


@cli.command()
def export(
    directory: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    form: Annotated[str, typer.Option(help="checkpoint, flat_adapter or portable_adapter.")] = "flat_adapter",
) -> None:
    """Copy one form of the chain, with its model card."""
    from tasks.export import export as export_form

    print(f"written: {export_form(directory, form)}")


@chain_cli.command()
def verify() -> None:
    """Compare every file with its hash, rebuild every prefix of the chain and compare its scores."""
    from flows.snapshot import checkout
    from flows.verify import verify as lines

    for line in lines(checkout()):
        print(line, flush=True)


@cli.command()
def sync() -> None:
    """Post the records of finished stages to MLflow, each once."""
    from flows.child import quiet

    quiet()
    from tasks.sync import sync as post

    print(f"{post()} record(s) posted")


@cli.command()
def clean(
    everything: Annotated[bool, typer.Option("--all", help="Interrupted runs too, whatever their age.")] = False,
) -> None:
    """Post what is left to post, then remove finished and abandoned workspaces, stale resume state and temporaries."""
    from flows.clean import clean as remove
    from flows.mend import mend
    from flows.snapshot import checkout

    for line in mend(checkout()):
        print(line)
    sync()  # a workspace takes the files of its records along
    gone = remove(checkout(), everything)
    for path in gone:
        print(f"removed {path}")
    print(f"{len(gone)} thing(s) removed")


@cli.command()
def adopt(
    run: Annotated[str, typer.Argument(help="The run's name, as its last line told.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes that the run did not have.")] = False,
) -> None:
    """Bring a run's params.yaml, dvc.lock and outs into the checkout."""
    from flows.snapshot import checkout
    from flows.workspace import adopt as bring

    written = bring(checkout(), run, force)
    print(f"adopted {run}: {', '.join(str(path) for path in written)}, and the outs of dvc.lock")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 75 for what may succeed later."""
    try:
        with system_told():
            result: Any = typer.main.get_command(cli).main(arguments, prog_name="cola", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (UserError, RetryError) as error:
        from rich.console import Console

        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print(line, style="red", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return int(result or 0)


def app() -> None:
    """The console script `cola`."""
    guard()
    atexit.register(gc.freeze)  # on its way out Python need not look through all of Prefect: half a second
    code = main()
    if server := sys.modules.get("flows.server"):
        server.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    app()
