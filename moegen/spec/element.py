"""Elements: the typed pieces of a spec. One class is one section of the file."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

FAMILY = "x-moegen-family"  # in a JSON Schema: any member of this family

Path = tuple[str | int, ...]


class Broken(ValueError):
    """Rules between fields that a section breaks: (path below the section, sentence) pairs."""

    def __init__(self, problems: list[tuple[Path, str]]) -> None:
        """Keep the problems; the loader turns each into a message with its own line."""
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


# Where schemas hold schemas. Keys of mappings are always text in a spec, so they stay lax.
_TABLES = {"fields", "choices"}
_PARTS = {"schema", "items_schema", "values_schema", "steps", *_TABLES}


def _exact(schema: Any) -> None:
    """Make numbers and booleans of a schema strict; all of strict mode would refuse lists too."""
    if isinstance(schema, (list, tuple)):
        for part in schema:
            _exact(part)
    elif isinstance(schema, dict):
        if schema.get("type") in ("int", "float", "bool"):
            schema.setdefault("strict", True)
        for key in _PARTS & schema.keys():
            inner = schema[key]
            _exact(list(inner.values()) if key in _TABLES and isinstance(inner, dict) else inner)


class Element(BaseModel):
    """A section of a spec: fields, rules between them, and (in `arch`) what it computes.

    `shorthand` names the field that a bare value stands for: `experts: 8` is
    `experts: {count: 8}` where the shorthand is "count". Numbers and booleans are taken as they
    are: the text '8' is no number, 8.0 is no whole number, and yes is not true.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None

    def rules(self) -> Iterator[tuple[Path, str]]:
        """Yield (path of the field to blame, sentence) for each broken rule between fields."""
        yield from ()

    @classmethod
    def summary(cls) -> str:
        """What it is, in a line: the first of its docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    def says(self, setting: Any) -> Iterator[str]:
        """What it does in a setting (`arch.setting`), in sentences; unless told, its summary."""
        yield self.summary()

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if cls.shorthand and not isinstance(value, (dict, BaseModel)):
            return {cls.shorthand: value}
        return value

    @model_validator(mode="after")
    def _obey_rules(self) -> Element:
        problems = list(self.rules())
        if problems:
            raise Broken(problems)
        return self

    @classmethod
    def __get_pydantic_core_schema__(  # noqa: D105
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        _exact(handler.resolve_ref_schema(schema))
        return schema

    @classmethod
    def __get_pydantic_json_schema__(  # noqa: D105
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        full = handler(schema)
        if cls.shorthand is None or issubclass(cls, Kinds):
            return full  # a family has the short form of its default kind, see `schema`
        field = handler.resolve_ref_schema(full).get("properties", {}).get(cls.shorthand, {})
        short = short_form(field)
        return {"anyOf": [full, short]} if short else full


def short_form(field: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON Schema of a bare value that stands for an element, from that of its field."""
    return {key: value for key, value in field.items() if key in _TYPE_KEYS}


_TYPE_KEYS = {"type", "anyOf", "minimum", "exclusiveMinimum", "maximum", "enum", "const", "$ref"}


class Kinds(Element):
    """A family of elements told apart by the key `kind`.

    A direct subclass of Kinds is the abstract family; a subclass of that with
    `kind: Literal["name"] = "name"` is final and registers itself. Two members of one name
    are an error, unless they are one class of a file that is imported twice: then the later counts.
    """

    members: ClassVar[dict[str, type[Kinds]]]
    default_kind: ClassVar[str | None] = None
    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Open a family, or enter a member into its family."""
        super().__pydantic_init_subclass__(**kwargs)
        if Kinds in cls.__bases__:
            cls.members = {}
            return
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):  # an intermediate base, not a member
            return
        known = cls.members.get(kind)
        if known is not None and _file(known) != _file(cls):
            places = f"{known.__module__} and {cls.__module__}"
            raise ValueError(f"{cls.family()} {kind!r} is defined twice: in {places}")
        cls.members[kind] = cls

    @classmethod
    def family(cls) -> str:
        """The family's name as users read it."""
        base = next(c for c in cls.__mro__ if Kinds in c.__bases__)
        return "".join(f" {c.lower()}" if c.isupper() else c for c in base.__name__).strip()


def _file(element: type) -> str:
    """The file that a class is from: a file imported under two names is one; else its module."""
    place = getattr(sys.modules.get(element.__module__), "__file__", None)
    return os.path.realpath(place) if place else element.__module__


def family_key(family: type[Kinds]) -> str:
    """The family as a JSON Schema refers to it before its definitions are there."""
    return f"{family.__module__}.{family.__qualname__}"


class OneOf:
    """Marks a field as one member of a family, looked up when the spec is read.

    So that members from plugins count: `Annotated[Score, OneOf(Score)]`. A bare string names
    the kind; a bare number is the default kind's shorthand; "none" is no member at all.
    """

    def __init__(self, family: type[Kinds], *, optional: bool = False) -> None:
        """Remember the family, and whether the part may be absent."""
        self.family = family
        self.optional = optional

    def __get_pydantic_core_schema__(  # noqa: D105
        self, source: Any, handler: Any
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.model_dump() if isinstance(value, BaseModel) else value
            ),
        )

    def __get_pydantic_json_schema__(  # noqa: D105
        self, schema: Any, handler: Any
    ) -> JsonSchemaValue:
        # A part may hold another of its own family, so members are not written out here:
        # `schema` gives each family one definition and points to it.
        inner: JsonSchemaValue = {FAMILY: family_key(self.family)}
        return {"anyOf": [inner, {"const": "none"}, {"type": "null"}]} if self.optional else inner

    def _validate(self, value: Any) -> Any:
        if isinstance(value, self.family):
            return value
        if value is None or value == "none":
            if self.optional:
                return None
            raise PydanticCustomError("missing_part", "a {family} is needed here", self._family())
        if isinstance(value, str):
            value = {"kind": value}
        elif not isinstance(value, dict):
            value = self._from_bare(value)
        kind = value.get("kind", self.family.default_kind)
        member = self.family.members.get(kind) if isinstance(kind, str) else None
        if member is None:
            known = {**self._family(), "kind": str(kind), "known": sorted(self.family.members)}
            raise PydanticCustomError("unknown_kind", "no {family} is called '{kind}'", known)
        return member.model_validate({**value, "kind": kind})

    def _from_bare(self, value: Any) -> dict[str, Any]:
        default = self.family.members.get(self.family.default_kind or "")
        if default is None or default.shorthand is None or isinstance(value, (list, bool)):
            raise PydanticCustomError(
                "bad_part", "a {family} is a name or a mapping", self._family()
            )
        return {"kind": self.family.default_kind, default.shorthand: value}

    def _family(self) -> dict[str, Any]:
        return {"family": self.family.family()}


def one_of(family: Any, *, optional: bool = False) -> Any:
    """The type of a field that holds one member of a family."""
    inner = family | None if optional else family
    return Annotated[inner, OneOf(family, optional=optional)]
