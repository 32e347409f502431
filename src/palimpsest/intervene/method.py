"""What most methods answer alike when asked, and the check that a class answers everything."""

import inspect
from dataclasses import fields, is_dataclass

from palimpsest.errors import RequestError
from palimpsest.intervene.intervention import Method
from palimpsest.intervene.moments import SampledMoments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site

ASKED = tuple(name for name in vars(Method) if not name.startswith("_"))
"""The members of `Method`, in the order in which it declares them."""


class MethodBase:
    """Answers of a method that edits single facts, at any layer, and is no control.

    A subclass adds `part` and `fit`, and overrides what is otherwise with it.
    """

    @property
    def place(self: Method) -> str:
        """The part's own row of the model's usual layers."""
        return self.part

    @property
    def lowest(self) -> int:
        """There is room at every layer."""
        return 0

    @property
    def scope(self) -> str:
        """It is fitted on single facts."""
        return "fact"

    @property
    def imitates(self) -> Method | None:
        """It is no control."""
        return None

    @property
    def sited(self) -> bool:
        """What it does depends on the site."""
        return True

    def sampled_moments(self, model: ModelHandle, site: Site) -> SampledMoments | None:
        """It takes no second moments."""
        return None

    def with_moments(self: Method, tokens: int, length: int) -> Method:
        """Itself."""
        return self


def check_method(kind: type, name: str) -> None:
    """Refuse a class that does not answer everything that is asked of a method.

    Args:
        kind: the class.
        name: of the configuration's key that names it.

    Raises:
        RequestError: names the first member of `Method` that the class lacks.
    """
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    known |= {member for member, _ in inspect.getmembers_static(kind)}
    missing = [member for member in ASKED if member not in known]
    if missing:
        raise RequestError(
            f"expected {name} to be a method with {', '.join(ASKED)}, found "
            f"{kind.__module__}.{kind.__qualname__} without {missing[0]}; declare it, or derive "
            "the class from palimpsest.intervene.method.MethodBase"
        )
