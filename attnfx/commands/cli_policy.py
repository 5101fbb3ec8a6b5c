"""The part of the command line about policies: `attnfx policy check | schema | presets | diff`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from attnfx.commands.completion import policies, preset_names
from attnfx.errors import PolicyError

if TYPE_CHECKING:
    from attnfx.policies.policy_file import Problem
    from attnfx.policy import Policy

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Check, compare and list policies: which variant serves which attention.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files: TOML, YAML or JSON.")],
    as_json: _Json = False,
) -> None:
    """Say everything that is wrong with policy files: file, line, key, what was found, what is allowed. Exit code 1 if anything is.

    Nothing of the files is executed, and no other file is read.

    Example: [bold]attnfx policy check policy.toml[/bold]
    """
    found = {str(path): _checked(path) for path in files}
    problems = [problem for policy, listed in found.values() for problem in listed]
    if as_json:
        print(json.dumps({"problems": [dataclasses.asdict(problem) for problem in problems]}, indent=2, ensure_ascii=False))
    else:
        for file, (policy, _) in found.items():
            if policy is not None:
                rules = f"{len(policy.rules)} rule{'s' * (len(policy.rules) != 1)}"
                print(f"{file}: {rules}{', and a default' if policy.default else ''}, all well-formed.")
        complaints = Console(stderr=True)
        for problem in problems:
            complaints.print("[red]error:[/red] ", end="")
            complaints.print(str(problem), markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


@app.command()
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as it does without this.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page of the docs that is made from it.")] = False,
) -> None:
    """Print the JSON schema of policy files, with which editors complete and check them.

    JSON files name it under "$schema"; TOML files in a first line "#:schema FILE" (Taplo), YAML files in
    "# yaml-language-server: $schema=FILE".

    Example: [bold]attnfx policy schema > policy.schema.json[/bold]
    """
    from attnfx.policies.policy_page import markdown
    from attnfx.policies.policy_schema import schema

    if as_markdown:
        print(markdown(), end="")
        return
    print(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command()
def presets(
    name: Annotated[
        str | None,
        typer.Argument(autocompletion=preset_names, help="One preset, printed as a file; a list of all without it."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the policies that have names, or print one as TOML to begin a file with.

    Example: [bold]attnfx policy presets streaming > policy.toml[/bold]
    """
    from attnfx.policies.presets import named, presets

    if name is not None:
        print(named(name).policy.dumps("json" if as_json else "toml"), end="")
    elif as_json:
        rows = [{"name": name, "summary": one.summary, "policy": one.policy.to_dict()} for name, one in presets().items()]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        console = Console()
        for name, one in presets().items():
            console.print(f"[bold]{name}[/bold]\n  {one.summary}", highlight=False)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", autocompletion=policies, help="A policy file, or the name of a preset.")],
    after: Annotated[str, typer.Argument(metavar="B", autocompletion=policies, help="Another one.")],
    as_json: _Json = False,
) -> None:
    """Say which rules of two policies differ, in order. Exit code 0 where none does, 1 where some do.

    Example: [bold]attnfx policy diff streaming policy.toml[/bold]
    """
    from attnfx.policies.policy_diff import changes
    from attnfx.policy import Policy

    found = changes(Policy.coerce(before), Policy.coerce(after))
    if as_json:
        print(json.dumps({"changes": [change.to_dict() for change in found]}, indent=2, ensure_ascii=False))
    else:
        console = Console()
        for change in found:
            colour = {"-": "red", "+": "green"}[change.sign]
            text = f"{change.sign} {change.place}: {change.rule}"
            console.print(text, style=colour, markup=False, highlight=False, soft_wrap=True)
        if not found:
            print("The policies say the same.")
    if found:
        raise typer.Exit(1)


def _checked(path: Path) -> tuple[Policy | None, list[Problem]]:
    from attnfx.policies.policy_file import Problem, read

    try:
        return read(path)
    except PolicyError as problem:
        return None, [Problem(str(path), 0, 0, "", str(problem))]
