"""One signature for methods that take the same: type checkers, editors and `help` see it at each of
them, and it is written at the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from pyvmm.api.cancellation import in_thread, made_in_thread
from pyvmm.kinds import registry
from pyvmm.spec.options import Option

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def signature_of(
    method: Callable[Concatenate[Any, P], object],
) -> Callable[[Callable[Concatenate[S, ...], R]], Callable[Concatenate[S, P], R]]:
    """The decorated method takes what `method` takes. What it returns is its own affair."""
    wanted = inspect.signature(method)

    def decorate(function: Callable[Concatenate[S, ...], R]) -> Callable[Concatenate[S, P], R]:
        result = inspect.signature(function).return_annotation
        function.__signature__ = wanted.replace(return_annotation=result)  # type: ignore[attr-defined]
        return function

    return decorate


class OfAllOptions:
    """The `__signature__` of a class whose __init__ takes each kind of device as a keyword, from
    the rows of their options. For `help` and the like; type checkers have registry.Keywords."""

    def __init__(self, **defaults: object) -> None:
        """`defaults` are those that are others than the command line's."""
        self._defaults = defaults

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if owner.__init__ is not self._owner.__init__:  # type: ignore[misc]
            raise AttributeError("__signature__")  # a class that takes something else
        of_init = inspect.signature(self._owner.__init__)  # type: ignore[misc]
        own = of_init.parameters
        rows = [own.get(row.name, self._keyword(row)) for row in registry.file_options()]
        return inspect.Signature(rows, return_annotation=of_init.return_annotation)

    def _keyword(self, row: Option) -> inspect.Parameter:
        default = self._defaults.get(row.name, row.default)
        return inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=default)


class Asynchronous(Generic[T_co]):
    """Has for a `T_co` what `awaited` makes of the methods of that."""

    def __init__(self, held: T_co) -> None:
        self._held = held


def awaited(
    method: Callable[Concatenate[T, P], R],
    call: Callable[..., Coroutine[Any, Any, R]] = in_thread,
) -> Callable[Concatenate[Asynchronous[T], P], Coroutine[Any, Any, R]]:
    """`method` as a coroutine function. It runs where `call` has it run: in a thread, which gives
    up before CancelledError goes on."""

    async def coroutine(self: Asynchronous[T], /, *args: P.args, **options: P.kwargs) -> R:
        return await call(method, self._held, *args, **options)

    return _named_as(method, coroutine)


A = TypeVar("A", bound=Asynchronous[Any])


def awaited_for_itself(
    method: Callable[Concatenate[T, P], T], undo: Callable[[T], object]
) -> Callable[Concatenate[A, P], Coroutine[Any, Any, A]]:
    """As `awaited`, for a method that returns its object. `undo` is called with that if the call is
    cancelled too late."""

    async def coroutine(self: A, /, *args: P.args, **options: P.kwargs) -> A:
        await made_in_thread(undo, method, self._held, *args, **options)
        return self

    return _named_as(method, coroutine)


F = TypeVar("F", bound=Callable[..., object])


def _named_as(method: Callable[..., object], function: F) -> F:
    function.__name__, function.__qualname__ = method.__name__, method.__qualname__
    function.__doc__ = method.__doc__
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return function
