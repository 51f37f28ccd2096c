"""`python -m stages request.json`: run one stage alone, on one rank or, under torchrun or accelerate launch, on many."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import ValidationError

from stages.errors import InputError
from stages.request import Request, run_stage


def main(arguments: list[str]) -> int:
    """Run the request in the file named by the one argument; 2 for what a person can mend, with one line on stderr."""
    if len(arguments) != 1:
        print("usage: python -m stages request.json", file=sys.stderr)
        return 2
    try:
        run_stage(_read(Path(arguments[0])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> Request:
    try:
        return Request.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: not a stage's request: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
