"""Arguments and docstrings of functions and classes, read from source without importing their modules.

Help and the check of a recipe's keys thus take a second, without torch and Composer.
"""

import ast
import builtins
import sys
from abc import ABCMeta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _Answering(ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class Unknown(metaclass=_Answering):
    """A stand-in for names that are not read; values of such a type are checked after the import."""

    def __init__(self, unknown: Any = None):  # marks arguments that are not known
        pass


@cache
def stub(target: str) -> Any:
    """Return a function or class ``module:name`` with its arguments and docstrings and without its body.

    Of a class there are base classes and ``__init__``, or the fields of a dataclass; base classes that are not found
    are :class:`Unknown`.
    """
    module, _, name = target.partition(":")
    node = definitions(module).get(name)
    if isinstance(node, str):
        known, _, name = node.partition(":")
        is_light = known in sys.modules and not known.startswith(("composer", "torch", "streaming"))
        return getattr(sys.modules[known], name, Unknown) if is_light else stub(node)
    if isinstance(node, ast.ClassDef):
        plain = [
            one.value if isinstance(one, ast.Subscript) else one
            for one in node.bases
            if ast.unparse(one)[:7] != "Generic"
        ]
        bases: list[Any] = [one if isinstance(one, ast.Name) else ast.Name("Unknown", ast.Load()) for one in plain]
        kept = [one for one in node.body if isinstance(one, ast.AnnAssign) or getattr(one, "name", "") == "__init__"]
        keeps = [one for one in node.decorator_list if "dataclass" in ast.unparse(one)]
        doc = ast.get_docstring(node) or ""
        body = [ast.Expr(ast.Constant(doc)), *(kept if keeps else [one for one in kept if hasattr(one, "name")])]
        used = {one.id for one in bases}
        whole: Any = ast.ClassDef(name, bases, [], [_empty(one) for one in body], keeps)
    elif isinstance(node, ast.FunctionDef):
        whole, used = _empty(node), set()
    elif isinstance(node, ast.expr):
        whole, used = ast.Assign([ast.Name(name, ast.Store())], node), set()
    else:
        return Unknown
    names: dict[str, Any] = {"__name__": module, "Unknown": Unknown}
    for one in {one.id for one in ast.walk(whole) if isinstance(one, ast.Name)} - {name, "Unknown"}:
        there = definitions(module).get(one)
        if one in used or not isinstance(_origin(module, one), ast.ClassDef | ast.FunctionDef):
            names[one] = stub(f"{module}:{one}") if there is not None else getattr(builtins, one, Unknown)
        else:
            names[one] = _Answering(one, (), {})
    try:
        exec(compile(ast.fix_missing_locations(ast.Module([whole], [])), module, "exec"), names)
    except Exception:  # of any code at module level
        return Unknown
    return names[name]


def _empty(node: Any) -> Any:
    """Return a function without decorators and with its docstring alone; return other nodes unchanged."""
    if not isinstance(node, ast.FunctionDef):
        return node
    doc = ast.Expr(ast.Constant(ast.get_docstring(node) or ""))
    return ast.FunctionDef(node.name, node.args, [doc], [], None)


def _origin(module: str, name: str) -> Any:
    """Return the node of a name in the module that defines it."""
    found = definitions(module).get(name)
    while isinstance(found, str):
        module, _, name = found.partition(":")
        found = definitions(module).get(name)
    return found


@cache
def definitions(module: str) -> dict[str, Any]:
    """Return a module's definitions: syntax trees by name, and ``module:name`` for imported names."""
    file = _file(module)
    if file is None:
        return {}
    package = (module if file.name == "__init__.py" else module.rpartition(".")[0]).split(".")
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            found.update((one.asname or one.name, f"{origin}:{one.name}") for one in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((one.id, node.value) for one in targets if isinstance(one, ast.Name))
    return found


def _file(module: str) -> Path | None:
    """Find the file of a module without importing its package."""
    first, *rest = module.split(".")
    spec = find_spec(first)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        place = Path(folder, *rest)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None
