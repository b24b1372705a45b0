"""Named components that a recipe can ask for: one look-up, one constructor.

Code from outside adds its own with :func:`register`, and a recipe loads it through ``code_paths``.
"""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

_COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Decorator that makes a constructor available as ``name`` among the components of a kind."""

    def add(constructor: Any) -> Any:
        _COMPONENTS.setdefault(kind, {})[name] = constructor
        return constructor

    return add


def look_up(kind: str, name: str, where: str) -> Callable[..., Any]:
    """The constructor registered as ``name``.

    Raises:
        ValueError: if there is none, naming ``where`` in the recipe and the nearest name.
    """
    names = _COMPONENTS.get(kind, {})
    if name not in names:
        raise ValueError(f"{where}={name!r} is not a known {kind}. {did_you_mean(name, names)}")
    return names[name]


def names(kind: str) -> list[str]:
    """What is registered among the components of a kind."""
    return [*_COMPONENTS.get(kind, {})]


def check(
    kind: str,
    name: str,
    arguments: Mapping[str, Any],
    where: str,
    given: Collection[str] = (),
    beside: Collection[str] = (),
) -> None:
    """Refuse arguments that the constructor does not have, of the wrong type, or missing.

    A constructor may say more in a static method ``check``, called with those of the arguments that it takes.

    Args:
        kind, name: which component.
        arguments: from the recipe.
        where: their place in the recipe, for the message.
        given: names of the arguments that the program itself will pass.
        beside: keys that stand beside the arguments there, for the message.

    Raises:
        ValueError: one line naming the key, what is accepted and the nearest valid key.
    """
    parameters = parameters_of(look_up(kind, name, f"{where}.name"))
    accepted = [key for key in parameters if key not in given]
    for key, value in arguments.items():
        if key not in accepted:
            raise ValueError(f"{where}.{key} is not a key of {name}. {did_you_mean(key, [*accepted, *beside])}")
        if not _accepts(parameters[key].annotation, value):
            expected = inspect.formatannotation(parameters[key].annotation)
            raise ValueError(f"{where}.{key}={value!r}: expected {expected}.")
    missing = [k for k in accepted if parameters[k].default is inspect.Parameter.empty and k not in arguments]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}.")
    further = getattr(look_up(kind, name, where), "check", None)
    if further is not None:
        further(**{key: arguments[key] for key in inspect.signature(further).parameters if key in arguments})


def build(kind: str, name: str, arguments: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Check the recipe's arguments and call the constructor with them and with those given by the program."""
    check(kind, name, arguments, where, given)
    return look_up(kind, name, where)(**given, **arguments)


def takes(constructor: Callable[..., Any], argument: str) -> bool:
    """Whether a constructor has an argument of this name."""
    return argument in parameters_of(constructor)


def did_you_mean(name: str, accepted: Collection[str]) -> str:
    """A sentence that names the nearest of the accepted names, and all of them if they are few."""
    nearest = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    if nearest and len(accepted) > 30:
        return hint.strip()
    return f"{hint}Accepted: {', '.join(sorted(accepted)) or 'none'}."


def parameters_of(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword parameters; where a class passes ``**kwargs`` on, those of its base classes too."""
    functions: list[Any] = (
        [vars(c).get("__init__") for c in constructor.__mro__[:-1]] if isinstance(constructor, type) else [constructor]
    )
    parameters: dict[str, inspect.Parameter] = {}
    for function in filter(None, functions):
        hints = _type_hints(function)
        own = inspect.signature(function).parameters.values()
        for parameter in own:
            if parameter.name != "self" and parameter.kind in (
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            ):
                hint = hints.get(parameter.name, Any)
                parameters.setdefault(parameter.name, parameter.replace(annotation=hint))
        if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations under TYPE_CHECKING: their types are not checked
        return {}


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a value from YAML fits an annotation; annotations that YAML cannot express accept everything."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in options)
    if origin is typing.Literal:
        return value in options
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if origin is tuple:
        options = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, list) else options
        return isinstance(value, list) and len(value) == len(options) and all(map(_accepts, options, value))
    if getattr(annotation, "__name__", None) == "Tensor":
        return False
    if (origin or annotation) in (dict, list, Mapping):
        return isinstance(value, origin or annotation)
    return True
