"""`refuses`: what an error must say, by its type and fields in place of its sentence."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, TypeVar

import pytest

from cumempool import CumempoolError

E = TypeVar("E", bound=CumempoolError)


class refuses(Generic[E]):  # noqa: N801 - reads as pytest.raises does
    """Expects an error of exactly this type, with these fields.

    ``with refuses(UnknownTagError, operation="sleep", tag="kv") as caught:``

    Args:
        kind: The type; one derived from it is another error.
        names: What the message must hold that no field does: an argument, a value, a holder.
        fields: The fields that are compared.
    """

    def __init__(self, kind: type[E], *, names: str | tuple[str, ...] = (), **fields: object):
        self._kind = kind
        self._names = (names,) if isinstance(names, str) else names
        self._fields = fields
        self._raises = pytest.raises(kind)

    def __enter__(self) -> pytest.ExceptionInfo[E]:
        self._caught = self._raises.__enter__()
        return self._caught

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not self._raises.__exit__(kind, error, traceback):
            return False
        caught = self._caught.value
        assert type(caught) is self._kind, repr(caught)
        said = {name: getattr(caught, name) for name in self._fields}
        assert said == self._fields, f"{said} is not {self._fields}: {caught}"
        missing = [name for name in self._names if name not in str(caught)]
        assert not missing, f"{missing} is not in: {caught}"
        assert str(caught).rstrip(".").endswith(caught.advice.rstrip(".")), repr(caught.advice)
        return True
