"""Plain values as dataclasses are, made in a fifteenth of the time.

``from imagekit.records import dataclass`` is that of ``dataclasses``, with ``slots=True``, frozen or not, for classes
without a base: to a type checker it is that very function. At run time the methods are closures over the names of the
fields, ``__init__`` is compiled when the first object is made, and what only ``dataclasses`` itself, ``inspect`` and
their like look at is made by them when they do. A command line loads dozens of such classes and uses a few.

What a dataclass can have besides (bases, ``order``, ``kw_only``, ``InitVar``, ``init=False``) is refused here:
``dataclasses`` has it. A class without a docstring stays without one.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, NoReturn

_MISSING: Any = object()
_REFUSED = ("ClassVar", "InitVar", "KW_ONLY")


class _Field:
    """What is known about a field."""

    __slots__ = ("compare", "default", "default_factory", "repr")

    def __init__(
        self, default: Any = _MISSING, default_factory: Any = _MISSING, repr: bool = True, compare: bool = True
    ) -> None:
        self.default = default
        self.default_factory = default_factory
        self.repr = repr
        self.compare = compare

    @property
    def is_optional(self) -> bool:
        return self.default is not _MISSING or self.default_factory is not _MISSING


def _field(
    *, default: Any = _MISSING, default_factory: Any = _MISSING, repr: bool = True, compare: bool = True
) -> Any:
    """``dataclasses.field``, as far as it goes here."""
    if default is not _MISSING and default_factory is not _MISSING:
        raise ValueError("cannot specify both default and default_factory")
    return _Field(default, default_factory, repr, compare)


def _dataclass(*, slots: bool, frozen: bool = False) -> Callable[[type], type]:
    """``dataclasses.dataclass``, as far as it goes here."""
    if not slots:
        raise TypeError("a record has slots; dataclasses.dataclass can do without")
    return lambda cls: _record(cls, frozen)


def _record(cls: type, frozen: bool) -> type:
    if cls.__bases__ != (object,):
        raise TypeError(f"{cls.__name__}: a record has no base; dataclasses.dataclass may have one")
    namespace = dict(cls.__dict__)
    fields = _fields(cls, namespace)
    namespace.pop("__dict__", None)
    namespace.pop("__weakref__", None)
    namespace |= {"__slots__": tuple(fields), "__match_args__": tuple(fields), "__record__": fields}
    namespace |= _ON_DEMAND
    methods = _methods(fields)
    if frozen:
        methods |= _frozen_methods(fields)
    if namespace.get("__hash__", _MISSING) is None:  # that of a class with an __eq__ of its own
        del namespace["__hash__"]
    made: type = type(cls)(cls.__name__, cls.__bases__, methods | namespace)
    if "__init__" not in namespace:
        _make_init_when_needed(made, frozen)
    return made


def _fields(cls: type, namespace: dict[str, Any]) -> dict[str, _Field]:
    """The fields by name, in order; their defaults are taken out of the namespace."""
    found: dict[str, _Field] = {}
    optional = ""
    for name, annotation in cls.__annotations__.items():
        if any(word in str(annotation) for word in _REFUSED):
            raise TypeError(f"{cls.__name__}.{name}: {annotation} is for dataclasses.dataclass")
        given = namespace.pop(name, _MISSING)
        one = found[name] = given if isinstance(given, _Field) else _Field(given)
        if one.default.__class__.__hash__ is None:
            raise ValueError(f"mutable default {one.default.__class__} for field {name} is not allowed")
        if one.is_optional:
            optional = name
        elif optional:
            raise TypeError(f"non-default argument {name!r} follows default argument {optional!r}")
    return found


def _methods(fields: dict[str, _Field]) -> dict[str, Any]:
    """What every record has."""
    names = tuple(fields)
    shown = tuple(name for name in names if fields[name].repr)
    values = _getter(tuple(name for name in names if fields[name].compare))

    def __eq__(self: Any, other: object) -> bool:  # noqa: N807
        if other.__class__ is not self.__class__:
            return NotImplemented
        return bool(values(self) == values(other))

    @recursive_repr()
    def __repr__(self: Any) -> str:  # noqa: N807
        inside = ", ".join([f"{name}={getattr(self, name)!r}" for name in shown])
        return f"{self.__class__.__qualname__}({inside})"

    def __getstate__(self: Any) -> list[Any]:  # noqa: N807
        return [getattr(self, name) for name in names]

    def __setstate__(self: Any, state: list[Any]) -> None:  # noqa: N807
        for name, value in zip(names, state, strict=True):
            object.__setattr__(self, name, value)

    return {
        "__eq__": __eq__,
        "__hash__": None,
        "__repr__": __repr__,
        "__replace__": _replace,
        "__getstate__": __getstate__,
        "__setstate__": __setstate__,
    }


def _frozen_methods(fields: dict[str, _Field]) -> dict[str, Any]:
    """What a record has besides that cannot be changed."""
    values = _getter(tuple(name for name in fields if fields[name].compare))

    def __hash__(self: Any) -> int:  # noqa: N807
        return hash(values(self))

    return {"__hash__": __hash__, "__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}


def _refuse_to_set(self: Any, name: str, value: Any) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: Any, name: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """The values of those fields, as a tuple."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: tuple(getattr(record, name) for name in names)


def _make_init_when_needed(cls: Any, frozen: bool) -> None:
    """The first object's ``__init__`` makes the class's."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        made = _init(cls, frozen)
        cls.__init__ = made
        made(self, *args, **kwargs)

    cls.__init__ = __init__


def _init(cls: Any, frozen: bool) -> Callable[..., None]:
    """``__init__`` as one would write it by hand."""
    fields: dict[str, _Field] = cls.__record__
    known: dict[str, Any] = {"_missing": _MISSING, "__name__": cls.__module__}
    parameters, lines = ["self"], []
    for name, one in fields.items():
        value = name
        if one.default_factory is not _MISSING:
            known[f"_make_{name}"] = one.default_factory
            parameters.append(f"{name}=_missing")
            value = f"_make_{name}() if {name} is _missing else {name}"
        elif one.default is not _MISSING:
            known[f"_default_{name}"] = one.default
            parameters.append(f"{name}=_default_{name}")
        else:
            parameters.append(name)
        if frozen:  # past __setattr__, which refuses
            known[f"_set_{name}"] = getattr(cls, name).__set__
            lines.append(f" _set_{name}(self, {value})")
        else:
            lines.append(f" self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    exec(f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"]), known)
    made: Callable[..., None] = known["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    return made


class _OnDemand:
    """What dataclasses and inspect want to know of a class, as they themselves say it of one with the same fields."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: Any) -> Any:
        import dataclasses
        import inspect

        fields: list[tuple[str, Any, Any]] = []
        for name, one in owner.__record__.items():
            given = {key: getattr(one, key) for key in ("default", "default_factory")}
            given = {key: value for key, value in given.items() if value is not _MISSING}
            field = dataclasses.field(repr=one.repr, compare=one.compare, **given)
            fields.append((name, owner.__annotations__[name], field))
        frozen = owner.__setattr__ is _refuse_to_set
        made: Any = dataclasses.make_dataclass(owner.__name__, fields, frozen=frozen)
        owner.__signature__ = inspect.signature(made)
        owner.__dataclass_fields__ = made.__dataclass_fields__
        owner.__dataclass_params__ = made.__dataclass_params__
        return getattr(owner, self._name)


_ON_DEMAND = {name: _OnDemand(name) for name in ("__dataclass_fields__", "__dataclass_params__", "__signature__")}


def _replace(record: Any, /, **changes: Any) -> Any:
    """``dataclasses.replace``, which it is for what is no record."""
    names = getattr(type(record), "__record__", None)
    if names is None:
        from dataclasses import replace

        return replace(record, **changes)
    for name in names:
        if name not in changes:
            changes[name] = getattr(record, name)
    return type(record)(**changes)


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:
    dataclass, field, replace = _dataclass, _field, _replace
