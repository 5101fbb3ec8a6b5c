"""The command line: `attnfx demo | explain | variants | policy | bench | tune | doctor`."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnfx.commands.cli_policy import app as policy_app
from attnfx.commands.completion import policies, target_names, variant_names
from attnfx.errors import AttnfxError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""attnfx finds every attention in a PyTorch model, says what it is, and runs it as the best kernel for that.

In a program: [bold]torch.compile(model, backend="attnfx")[/bold].

Start with [bold]attnfx demo[/bold], then [bold]attnfx explain my_package.models:make_model[/bold].""",
    epilog="""Exit codes: 0 it is done; 1 it failed: an error in one sentence on standard error (with --json an object "error"
on standard output), the traceback of your own function, or a kernel that does not fit; 2 the command line itself is wrong;
130 interrupted.

Shell completion: [bold]attnfx --install-completion[/bold], then open a new shell.""",
)
app.add_typer(policy_app, name="policy")
console = Console()
problems = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    """Run the command line; an error that attnfx raises on purpose is one sentence and exit code 1."""
    try:
        app()
    except AttnfxError as error:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}, ensure_ascii=False))
            sys.exit(1)
        problems.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        problems.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def demo(
    length: Annotated[int, typer.Option(min=2048, help="Tokens in the sequence.")] = 4096,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Calls to time; the median is printed.")] = 5,
    as_json: Json = False,
) -> None:
    """Run an unmodified Llama on the CPU, three ways side by side, and show what was found in it.

    Example: [bold]attnfx demo --length 8192 --layers 4[/bold]
    """
    from attnfx.commands.demo import Settings, run

    results = run(Settings(length, layers, repeats), problems if as_json else console)
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))


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
    policy: Annotated[
        Path | None, typer.Option(autocompletion=policies, help="A policy file, or a preset: which variant for which layers.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    kernels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the source of each kernel that is generated for a GPU.")
    ] = None,
    ptx: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            autocompletion=target_names,
            help="With --kernels: also what they compile to, without a GPU: sm90, or sm90,gfx942. With --html: their registers.",
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="With --ptx: what lengths known only at run time are taken to be.")] = 4096,
    as_json: Json = False,
) -> None:
    """Say what attnfx finds in a model, what it would run for each attention, and why. Nothing is compiled for speed.

    With a file models.py here that holds

        def make_model(): return MyModel(), (torch.ones(1, 128, dtype=torch.long),)

    [bold]attnfx explain models:make_model[/bold] prints the report;

    [bold]attnfx explain models:make_model --policy policy.toml --html report.html[/bold] what would run under a policy, and a page;

    [bold]attnfx explain models:make_model --json | jq '.sites[].formula'[/bold] data;

    [bold]attnfx explain models:make_model --kernels kernels --ptx sm90[/bold] the kernels, compiled without a GPU.
    """
    if ptx is not None and kernels is None and html is None:
        problems.print(
            "--ptx says for what the kernels are compiled; say where they go with --kernels DIR, or --html FILE.", soft_wrap=True
        )
        raise typer.Exit(2)
    targets = [target.strip() for target in (ptx or "").split(",") if target.strip()]
    import torch

    import attnfx
    from attnfx.commands.factories import model_and_inputs, own_traceback
    from attnfx.policy import Policy

    rules = Policy.coerce(policy) if policy is not None else None
    model, args, kwargs = model_and_inputs(factory, inputs)
    with _progress("looking at the graphs of the model"), torch.no_grad():
        looked = functools.partial(attnfx.explain, model, *args, policy=rules, **kwargs)
        report = own_traceback(looked, lambda: model(*args, **kwargs))
    print(report.to_json() if as_json else report)
    if html is not None:
        with _progress("writing the page"):
            report.to_html(html, targets, sample)
        problems.print(f"The report is in {html}.", markup=False, highlight=False)
    if kernels is not None:
        with _progress("writing the kernels"):
            saved = report.save_kernels(kernels, targets, ptx=ptx is not None, sample=sample)
        for line in (*saved.without, f"{len(saved.files)} files of kernels are in {kernels}."):
            problems.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def variants(
    name: Annotated[str | None, typer.Argument(autocompletion=variant_names, help="One variant; all of them without it.")] = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The gallery of the docs: pictures, docstrings, papers.")] = False,
) -> None:
    """List what a policy can put in place of an attention: each variant's parameters and paper, and with a name its picture.

    Example: [bold]attnfx variants SlidingWindow[/bold]
    """
    from attnfx import variants as registry
    from attnfx.reports.variant_picture import picture
    from attnfx.reports.variant_table import described, markdown

    chosen = registry.all() if name is None else {name: registry.named(name)}
    if as_markdown:
        print(markdown(chosen), end="")
        return
    rows = described(chosen)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        console.print(f"[bold]{row['name']}[/bold]({row['parameters']})", highlight=False)
        console.print(f"  {row['summary']}\n  {row['exactness']}\n  {row['paper']}", highlight=False, markup=False)
        if name is not None:
            example = registry.named(name).examples()[0]
            seen = f"Which of {example.keys} keys (columns) {example.queries} queries (rows) see under {example.variant}:"
            for text in (f"\n{row['doc']}\n", seen, picture(example)):
                console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, as_json: Json = False) -> None:
    """Run the whole-model benchmark of a clone of the repository; what follows `bench` is passed on to it.

    Example: [bold]attnfx bench --quick --rows 'llama*' --json[/bold]

    [bold]attnfx bench -- --help[/bold] prints the benchmark's own options.
    """
    if not Path("benchmarks/models.py").is_file():
        problems.print("The benchmarks are in the repository, not in the installed package: run this in a clone of it.")
        raise typer.Exit(2)
    command = [sys.executable, "-m", "benchmarks.models", *context.args]
    if not as_json:
        raise typer.Exit(subprocess.call(command))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        code = subprocess.call([*command, "--out", str(results)], stdout=sys.stderr)
        if results.is_file():
            print(results.read_text(encoding="utf-8"), end="")
    raise typer.Exit(code)


@app.command()
def tune(
    factory: Annotated[
        str | None,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns (model, args, kwargs), (model, args), or with --inputs the model; on a GPU.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FN", help="A function that returns (args, kwargs) or args for the model."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(autocompletion=policies, help="A policy file, or a preset: which variant for which layers.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="For each attention and shape.")] = 60.0,
    backward: Annotated[bool, typer.Option("--backward", help="Tune the gradients' kernels too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Search also for what is remembered.")] = False,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what is remembered for this device.")] = None,
    taken: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="First take what was exported on a device like this one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --import: also from another device or other versions.")] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest configuration of each kernel that a model's attentions run, on the GPU of this machine, and remember it.

    Example: [bold]attnfx tune my_package.models:make_model --backward --export tuned.json[/bold]
    """
    if factory is None and export is None and taken is None:
        problems.print("Name a model to tune (package.module:function), or a file to --import or --export.")
        raise typer.Exit(2)
    from attnfx.commands import tune as tuning
    from attnfx.commands.factories import model_and_inputs
    from attnfx.lowering.tuning.progress import bar
    from attnfx.policy import Policy

    where = tuning.here()
    if taken is not None:
        problems.print(f"{tuning.import_file(taken, force)} new entries from {taken}.", markup=False, soft_wrap=True)
    if factory is not None:
        rules = Policy.coerce(policy) if policy is not None else None
        model, args, kwargs = model_and_inputs(factory, inputs)
        with bar(problems) as tell:
            done = tuning.tune(model, args, kwargs, tuning.Settings(budget, backward, again, rules), tell)
        if as_json:
            print(json.dumps(done.to_data(), indent=2, ensure_ascii=False))
        elif done.outcomes:
            console.print(done.table())
        if not done.outcomes:
            what = (
                f"{done.remembered} kernels are remembered; --again searches anew" if done.remembered else "no kernel ran on a GPU"
            )
            problems.print(f"There was nothing to search for: {what}.", markup=False, soft_wrap=True)
        problems.print(f"Remembered for {where} in {done.file}", markup=False, soft_wrap=True)
    if export is not None:
        problems.print(f"{tuning.export_file(export)} entries written to {export}.", markup=False, soft_wrap=True)


@app.command()
def doctor(
    targets: Annotated[
        str | None,
        typer.Option(
            autocompletion=target_names, help="Also compile every kernel for these, without a GPU: sm80,sm90,sm100,gfx942."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed, which lowering runs here and why, and what is known against these versions; with --targets, that
    the kernels compile for other GPUs.

    Example: [bold]attnfx doctor --targets sm90[/bold]
    """
    from attnfx.commands.doctor import checked, installed, kernels_table

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
