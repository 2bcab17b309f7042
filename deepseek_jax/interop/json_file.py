"""The JSON files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from deepseek_jax.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that `file` holds, in UTF-8 with or without a byte order mark. Raises CheckpointError if it cannot be read."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"can't read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, expected an object of fields")
    return fields
