"""What every section of the configuration is: a frozen dataclass that checks what it is given."""

from typing import Annotated, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import Field

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def strict(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks its values and refuses unknown fields."""
    forbid = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=forbid)(cls))


Positive = Annotated[float, Field(gt=0)]
