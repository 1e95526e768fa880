"""Reading TOML files into strict pydantic models, with one form of error for all of them."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeport.errors import BadInputError


class Strict(BaseModel):
    """A frozen schema that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SchemaT = TypeVar("SchemaT", bound=BaseModel)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed in the table that holds the last part of `location`."""
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if current is None or not isinstance(part, str) or part not in current.model_fields:
            continue
        annotation: Any = current.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        current = next((a for a in nested if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return [] if current is None else [field.alias or name for name, field in current.model_fields.items()]


def parse_mapping(model: type[SchemaT], value: dict[str, Any], where: object) -> SchemaT:
    """Check a mapping against a schema.

    Raises:
        BadInputError: naming the first key that is wrong, what it must be, and the keys allowed there.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        allowed: list[str] | None = None
        if first["type"] == "extra_forbidden":
            allowed = _fields_at(model, first["loc"])
            close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
            what = f"The key '{key}' is unknown." + (f" Did you mean '{close[0]}'?" if close else "")
        elif first["type"] == "missing":
            what = f"The key '{key}' is missing."
        else:
            message = first["msg"].removeprefix("Value error, ")
            what = f"The key '{key}' is wrong: {message}. Got {first['input']!r} instead."
        raise BadInputError(what, where=where, allowed=allowed) from error


def toml_names(folder: Path) -> list[str]:
    """The names of a folder's TOML files, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def named_toml(
    kind: str, reference: str, folder: Path, *, where: str | None = None, next_step: str | None = None
) -> Path:
    """The TOML file of a folder given by name, or by the path of any TOML file (which may not exist).

    Args:
        kind: what the folder has, in a word, for the message.

    Raises:
        BadInputError: the folder has none of this name; naming those that it has.
    """
    path = Path(reference)
    if path.suffix == ".toml":
        return path
    path = folder / f"{reference}.toml"
    if "/" in reference or not path.is_file():
        close = difflib.get_close_matches(reference, toml_names(folder), n=1)
        raise BadInputError(
            f"There is no {kind} {reference!r}." + (f" Did you mean {close[0]!r}?" if close else ""),
            where=where,
            allowed=[*toml_names(folder), "or the path of a .toml file"],
            next_step=next_step,
        )
    return path


def read_toml(model: type[SchemaT], path: Path) -> SchemaT:
    """Read a TOML file into a schema.

    Raises:
        BadInputError: the file is missing, is not TOML, or does not fit the schema.
    """
    try:
        value = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"The file can't be read: {error}.", where=path) from error
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"The file is not valid TOML: {error}.", where=path) from error
    return parse_mapping(model, value, path)
