"""`python -m evengaze`, and what the command `evengaze` starts: where its packages are missing, one line says so."""

from __future__ import annotations

import sys

from evengaze.errors import MissingExtraError
from evengaze.extras import require


def main() -> None:
    """Run the command line."""
    try:
        require("cli", "the command line", "typer", "rich")
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    from evengaze.cli import main as run

    run()


if __name__ == "__main__":
    main()
