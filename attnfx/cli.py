"""The command line: `attnfx demo | explain | variants | bench | tune | doctor`."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnfx.errors import AttnfxError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""attnfx finds every attention in a PyTorch model, says what it is, and runs it as the best kernel for that.

In a program: [bold]torch.compile(model, backend="attnfx")[/bold].

Start with [bold]attnfx demo[/bold], then [bold]attnfx explain my_package.models:make_model[/bold].""",
)
console = Console()
problems = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    """Run the command line; an error that attnfx raises on purpose is one sentence and exit code 1."""
    try:
        app()
    except AttnfxError as error:
        problems.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        problems.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def demo(
    length: Annotated[int, typer.Option(min=2048, help="Tokens in the sequence.")] = 4096,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Calls to time; the median is printed.")] = 5,
) -> None:
    """Run an unmodified Llama on the CPU, three ways side by side, and show what was found in it."""
    from attnfx.demo import Settings, run

    run(Settings(length, layers, repeats), console)


@app.command()
def explain(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns (model, args, kwargs), (model, args), or with --inputs the model.",
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FN", help="A function that returns (args, kwargs) or args for the model."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A policy file (TOML): which variant for which layers.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Say what attnfx finds in a model, what it would run for each attention, and why.

    Example: [bold]attnfx explain my_package.models:make_model --policy policy.toml --html report.html[/bold]
    """
    import torch

    import attnfx
    from attnfx.factories import model_and_inputs
    from attnfx.policy import Policy

    rules = Policy.load(policy) if policy is not None else None
    model, args, kwargs = model_and_inputs(factory, inputs)
    with _progress("compiling the model to look at its graphs"), torch.no_grad():
        report = attnfx.explain(model, *args, policy=rules, **kwargs)
    print(report.to_json() if as_json else report)
    if html is not None:
        report.to_html(html)
        problems.print(f"The report is in {html}.", markup=False, highlight=False)


@app.command()
def variants(
    name: Annotated[str | None, typer.Argument(help="One variant; all of them without it.")] = None,
    as_json: Json = False,
) -> None:
    """List what a policy can put in place of an attention: each variant's parameters and paper."""
    from attnfx import variants as registry
    from attnfx.variant_table import described

    rows = described(registry.all() if name is None else {name: registry.named(name)})
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        console.print(f"[bold]{row['name']}[/bold]({row['parameters']})", highlight=False)
        console.print(f"  {row['summary']}\n  {row['exactness']}\n  {row['paper']}", highlight=False, markup=False)
        if name is not None:
            console.print(f"\n{row['doc']}", highlight=False, markup=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the whole-model benchmark of a clone of the repository; what follows `bench` is passed on to it.

    [bold]attnfx bench -- --help[/bold] prints the benchmark's own options.
    """
    if not Path("benchmarks/models.py").is_file():
        problems.print("The benchmarks are in the repository, not in the installed package: run this in a clone of it.")
        raise typer.Exit(2)
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks.models", *context.args]))


@app.command()
def tune() -> None:
    """Not in this version: kernels run with their default configurations."""
    problems.print(
        "This version has no autotuning: every kernel runs with the default configuration for its device, head size "
        "and dtype (attnfx/lowering/configs.py), so there is nothing to tune and nothing was changed."
    )
    raise typer.Exit(2)


@app.command()
def doctor(
    targets: Annotated[
        str | None,
        typer.Option(help="Also compile every kernel for these, without a GPU: sm80,sm90,sm100,gfx942."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed and which lowering runs here; with --targets, that the kernels compile for other GPUs."""
    from attnfx.doctor import checked, installed, kernels_table

    facts = installed()
    rows: list[dict[str, Any]] = []
    if targets is not None:
        with _progress("compiling the kernels") as doing:
            rows = checked([target.strip() for target in targets.split(",") if target.strip()], doing)
    if as_json:
        print(json.dumps({"installed": facts, "kernels": rows}, indent=2))
    else:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, value in facts.items():
            table.add_row(f"[bold]{key}[/bold]", value)
        console.print(table, highlight=False)
        if rows:
            console.print(kernels_table(rows))
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


@contextmanager
def _progress(doing: str) -> Iterator[Callable[[str], None]]:
    """Say on standard error what slow thing is going on; standard output stays clean for --json."""
    with problems.status(doing) as status:
        yield status.update
