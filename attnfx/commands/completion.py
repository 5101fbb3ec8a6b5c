"""What a shell completes: names of variants, presets and targets, read from the source, since importing torch takes seconds."""

from __future__ import annotations

import ast
from pathlib import Path

_HERE = Path(__file__).parents[1]


def variant_names(incomplete: str = "") -> list[str]:
    """The variants that begin so; the package lists them for type checkers."""
    tree = ast.parse((_HERE / "variants" / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imported = [name for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]
    return sorted(name.name for name in imported if name.name.startswith(incomplete))


def preset_names(incomplete: str = "") -> list[str]:
    """The presets that begin so."""
    return _keys("policies/presets.py", "presets", incomplete)


def target_names(incomplete: str = "") -> list[str]:
    """The targets that begin as what stands behind the last comma, with what stands before it."""
    given, comma, last = incomplete.rpartition(",")
    return [f"{given}{comma}{name}" for name in _keys("lowering/configs.py", "SHARED_LIMIT", last)]


def policies(incomplete: str = "") -> list[str]:
    """Presets, and the files that policies can be in, that begin so."""
    folder, slash, name = incomplete.rpartition("/")
    here = Path(folder or ("/" if slash else "."))
    found = sorted(here.iterdir()) if here.is_dir() else []
    paths = [path for path in found if path.name.startswith(name) and not path.name.startswith(".")]
    files = [f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in paths if _may_be_one(path)]
    return [*preset_names(incomplete), *files]


def _may_be_one(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".toml", ".yaml", ".yml", ".json")


def _keys(file: str, of: str, begin: str) -> list[str]:
    """The keys of the dictionary that ``of``, a constant or a function of the module, is or returns."""
    for node in ast.parse((_HERE / file).read_text(encoding="utf-8")).body:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
        if of in names or (isinstance(node, ast.FunctionDef) and node.name == of):
            known = next(found for found in ast.walk(node) if isinstance(found, ast.Dict))
            return [str(key.value) for key in known.keys if isinstance(key, ast.Constant) and str(key.value).startswith(begin)]
    return []
