"""What a stage's script uses, read from its source: the files that it imports and the settings that it loads."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from samlove.config import SECTIONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("samlove", "stores", "pipelines")
SECTION_OF = {cls.__name__: name for name, cls in SECTIONS.items()}


def imported_files(script: Path) -> set[str]:
    """The project's files that `script` executes, including itself, as paths relative to the root.

    Imports within functions count. An `__init__.py` without statements does not.
    """
    found: set[Path] = set()
    todo = [script]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += (file for module in _imports(path) for file in _files(module))
    return {str(path.relative_to(ROOT)) for path in found if has_code(path)}


@cache
def _imports(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def _files(module: str) -> Iterator[Path]:
    """The files that importing `module` executes: its own, and the `__init__.py` of its packages."""
    parts = module.split(".")
    if parts[0] in PACKAGES:
        for n in range(1, len(parts) + 1):
            stem = ROOT.joinpath(*parts[:n])
            yield from (p for p in (stem / "__init__.py", stem.with_suffix(".py")) if p.is_file())


@cache
def has_code(path: Path) -> bool:
    """Whether a module is anything but an `__init__.py` with at most a docstring."""
    body = ast.parse(path.read_text()).body
    return path.name != "__init__.py" or any(not isinstance(node, ast.Expr) for node in body)


def loaded_parameters(script: Path) -> dict[str, set[str] | None]:
    """Section -> the keys that `script` reads, None for all of them.

    All keys, if the script passes on the result of `load(...)`; otherwise the attributes that it uses. A script that
    uses SECTIONS reads all sections but those of the ablations. `root` does not count, because it is in no file.
    """
    tree = ast.parse(script.read_text())
    if any(isinstance(node, ast.Name) and node.id == "SECTIONS" for node in ast.walk(tree)):
        return dict.fromkeys(SECTIONS.keys() - {"ablations"})
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    read: dict[str, set[str] | None] = {}
    for scope in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        names: dict[str, str] = {}
        for node in ast.walk(scope):
            section = _loaded(node)
            if section:
                target, parent = None, parents[node]
                if isinstance(parent, ast.Tuple) and isinstance(parents[parent], ast.Assign):
                    targets = parents[parent].targets[0]  # a, b = load(A), load(B)
                    target = targets.elts[parent.elts.index(node)]
                elif isinstance(parent, ast.Assign):
                    target = parent.targets[0]
                if isinstance(target, ast.Name):
                    names[target.id] = section
                    read.setdefault(section, set())
                else:
                    _use(read, section, parent)
        for node in ast.walk(scope):
            if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
                _use(read, names[node.id], parents[node])
    return {section: keys if keys is None else keys - {"root"} for section, keys in read.items()}


def _loaded(node: ast.AST) -> str | None:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load"
    return SECTION_OF.get(getattr(node.args[0], "id", "")) if called and node.args else None


def _use(read: dict[str, set[str] | None], section: str, user: ast.AST) -> None:
    keys = read.setdefault(section, set())
    if isinstance(user, ast.Attribute) and keys is not None:
        keys.add(user.attr)
    else:
        read[section] = None
