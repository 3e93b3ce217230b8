"""``llmopt recipes``: the project's own recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.table import Table

from llmopt.cli.console import output


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe: a name, or a .yaml file's path.")
    ] = None,
) -> None:
    """List the recipes, or show one."""
    from llmopt.recipe import load_recipe, recipe_files

    files = recipe_files()
    if name is not None:
        load_recipe(name)
        path = files.get(name, Path(name))
        output.print(Syntax(path.read_text(encoding="utf-8"), "yaml"))
        return
    table = Table("recipe", "scheme", "solver", "for", "what it is")
    for known in files:
        recipe = load_recipe(known)
        table.add_row(
            known,
            recipe.quantize.scheme.label,
            recipe.quantize.solver if recipe.awq is None else f"awq, {recipe.quantize.solver}",
            ", ".join(recipe.output.consumers),
            recipe.description,
        )
    output.print(table)
