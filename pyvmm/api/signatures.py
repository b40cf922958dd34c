"""One signature for methods that take the same: type checkers, editors and `help` see it at each of
them, and it is written at the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from pyvmm.api.cancellation import in_thread

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
    method: Callable[Concatenate[T, P], T],
) -> Callable[Concatenate[A, P], Coroutine[Any, Any, A]]:
    """As `awaited`, for a method that returns its object."""

    async def coroutine(self: A, /, *args: P.args, **options: P.kwargs) -> A:
        await in_thread(method, self._held, *args, **options)
        return self

    return _named_as(method, coroutine)


F = TypeVar("F", bound=Callable[..., object])


def _named_as(method: Callable[..., object], function: F) -> F:
    function.__name__, function.__qualname__ = method.__name__, method.__qualname__
    function.__doc__ = method.__doc__
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return function
