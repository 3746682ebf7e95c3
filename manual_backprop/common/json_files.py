"""Reading a JSON file that holds one object, with a sentence for each way to fail; nested mappings as dotted keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError


def read_object(file: Path, missing: str | None = None, kind: type[InputError] = InputError) -> dict[str, Any]:
    """The object in a JSON file. Raises `kind`; its message is `missing` if the file does not exist."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            raise kind(missing) from error
        raise kind(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{file} is damaged: it is not JSON") from error
    if not isinstance(content, dict):
        raise kind(f"{file} is damaged: expected a JSON object")
    return content


def flattened(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values: {"model": {"d_model": 4}} -> ("model.d_model", 4). An empty mapping is a value."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
