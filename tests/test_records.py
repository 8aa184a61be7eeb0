"""Records (imagekit.records) behave as the same classes do when dataclasses makes them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from imagekit import records

SHAPES: dict[str, tuple[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "values": ("a: int\n b: str", [((1, "x"), {}), ((2,), {"b": "y"}), ((), {"a": 1, "b": "x"})]),
    "one": ("a: int", [((1,), {}), ((2,), {})]),
    "none": ("pass", [((), {})]),
    "defaults": (
        "a: int\n b: int | None = None\n c: str = 'c'",
        [((1,), {}), ((1, 2), {"c": "d"}), ((1, None, "c"), {})],
    ),
    "factory": (
        "a: int = 1\n b: dict = field(default_factory=dict)",
        [((), {}), ((1, {"x": 2}), {}), ((), {"a": 3})],
    ),
    "hidden": ("a: int\n b: object = field(default=None, compare=False, repr=False)", [((1, 2), {}), ((1,), {})]),
    "after": (
        "a: int\n def __post_init__(self):\n  assert self.a >= 0, self.a",
        [((1,), {}), ((2,), {})],
    ),
    "members": ("a: int = 4\n @property\n def twice(self): return 2 * self.a\n K = 7", [((), {}), ((5,), {})]),
    "own": ("a: int\n def __repr__(self): return 'mine'\n def __str__(self): return 's'", [((1,), {}), ((2,), {})]),
    "equal": (
        "a: int\n b: int\n def __eq__(self, other): return str(self) == str(other)",
        [((1, 2), {}), ((1, 3), {})],
    ),
}
WRONG: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((1, 2, 3, 4, 5), {}), ((), {"z": 1}), ((1,), {"a": 1})]


def make(module: Any, name: str, frozen: bool) -> Any:
    """The class of that shape, made by one module or the other; found by pickle, too."""
    space: dict[str, Any] = {"dataclass": module.dataclass, "field": module.field, "__name__": __name__}
    body = f'"""Doc."""\n {SHAPES[name][0]}'
    exec(f"@dataclass(frozen={frozen}, slots=True)\nclass Made:\n {body}", space)
    globals()["Made"] = space["Made"]
    return space["Made"]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind and words of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def behaviour(made: Any, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
    """Everything that can be seen of a class, as plain values."""
    objects = [made(*positional, **named) for positional, named in arguments]
    first = objects[0]
    pickled = [pickle.loads(pickle.dumps(one, protocol)) for one in objects for protocol in (2, 5)]
    return {
        "repr": [repr(one) for one in objects],
        "str": [str(one) for one in objects],
        "equal": [[one == other for other in [*objects, 1, None]] for one in objects],
        "hash": [[outcome(partial(hash, one)) for one in objects]],
        "set": outcome(partial(setattr, copy.copy(first), "a", 1)) if made.__slots__ else None,
        "unknown": isinstance(outcome(lambda: setattr(first, "z", 1)), tuple),  # Python before 3.12: a TypeError
        "asdict": [dataclasses.asdict(one) for one in objects],
        "fields": [(one.name, one.type, one.repr, one.compare, one.init) for one in dataclasses.fields(made)],
        "optional": [one.default is dataclasses.MISSING for one in dataclasses.fields(first)],
        "is": (dataclasses.is_dataclass(made), dataclasses.is_dataclass(first), made.__dataclass_params__.frozen),
        "names": (
            made.__name__,
            made.__qualname__,
            made.__module__,
            made.__doc__,
            made.__match_args__,
            made.__slots__,
        ),
        "signature": str(inspect.signature(made)),
        "dict": hasattr(first, "__dict__"),
        "copied": [repr(copy.copy(one)) + repr(copy.deepcopy(one)) for one in objects],
        "pickled": [repr(one) for one in pickled] + [type(one) is made for one in pickled],
        "replaced": [repr(dataclasses.replace(one)) for one in objects],
        "replaced wrongly": outcome(lambda: dataclasses.replace(first, z=1)),
        "wrong": [outcome(partial(made, *p, **n)) for p, n in WRONG],
        "refused": outcome(lambda: made(-1)) if "__post_init__" in vars(made) else None,
    }


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_behaves_as_the_dataclass_of_its_shape(shape: str, frozen: bool) -> None:
    arguments = SHAPES[shape][1]
    expected = behaviour(make(dataclasses, shape, frozen), arguments)
    seen = behaviour(make(records, shape, frozen), arguments)
    assert seen == expected


@pytest.mark.parametrize("frozen", [True, False])
def test_equality_does_not_look_at_what_is_left_out_of_it(frozen: bool) -> None:
    made = make(records, "hidden", frozen)
    assert made(1, 2) == made(1, 3) != made(2, 2)
    assert repr(made(1, 2)) == "Made(a=1)"


def test_a_frozen_record_cannot_be_changed() -> None:
    made = make(records, "values", True)
    one = made(1, "x")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'a'"):
        one.a = 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'b'"):
        del one.b
    assert (one.a, one.b) == (1, "x")


def test_a_record_that_is_not_frozen_can_be_changed() -> None:
    one = make(records, "defaults", False)(1)
    one.b = 5
    assert one == records.replace(one, b=5)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_replace_is_that_of_dataclasses_for_what_is_no_record() -> None:
    for module in (records, dataclasses):
        one = make(module, "defaults", True)(1)
        assert (
            repr(records.replace(one, c="z")) == repr(dataclasses.replace(one, c="z")) == "Made(a=1, b=None, c='z')"
        )
        with pytest.raises(TypeError):
            records.replace(one, z=1)


def test_replace_checks_the_new_values() -> None:
    with pytest.raises(AssertionError, match="-3"):
        records.replace(make(records, "after", True)(1), a=-3)


def test_each_record_gets_a_default_of_its_own_from_a_factory() -> None:
    made = make(records, "factory", True)
    assert made().b is not made().b


def test_a_record_that_holds_itself_can_be_shown() -> None:
    made = make(records, "factory", True)
    one = made()
    one.b["self"] = one
    assert repr(one) == "Made(a=1, b={'self': ...})"


def test_threads_may_make_the_first_object_at_once() -> None:
    made = make(records, "defaults", True)
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda: seen.append(made(1, c="x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [made(1, None, "x")] * 8


@pytest.mark.parametrize(
    ("body", "options", "error"),
    [
        ("a: list = []", "slots=True", ValueError),
        ("a: int = 1\n b: int", "slots=True", TypeError),
        ("a: ClassVar[int] = 1", "slots=True", TypeError),
        ("a: int = field(init=False)", "slots=True", TypeError),
        ("a: int = field(default=1, default_factory=int)", "slots=True", ValueError),
        ("a: int", "slots=False", TypeError),
        ("a: int", "slots=True, order=True", TypeError),
    ],
)
def test_what_a_record_cannot_be_is_refused_where_the_class_is_made(
    body: str, options: str, error: type[Exception]
) -> None:
    space = {"dataclass": records.dataclass, "field": records.field, "__name__": __name__}
    source = f"from __future__ import annotations\n@dataclass({options})\nclass Made:\n {body}"
    with pytest.raises(error):
        exec(source, space)


def test_a_record_has_no_base() -> None:
    with pytest.raises(TypeError, match="no base"):

        @records.dataclass(frozen=True, slots=True)
        class _Heir(Exception):
            a: int


def test_records_load_nothing_of_dataclasses_or_inspect() -> None:
    """They are what takes the time, in the confined process above all."""
    program = """if True:
        import sys
        from imagekit.formats.base import Extent
        from imagekit.records import replace
        one = Extent(0, 1, True, False)
        assert replace(one, start=1) != one and hash(one) == hash(replace(one)) and "start=0" in repr(one)
        print(*sorted({"dataclasses", "inspect"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"], stdout=-1
    )
    assert (done.returncode, done.stdout.strip()) == (0, b"")
