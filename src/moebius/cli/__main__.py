"""Entry point of ``moebius`` and of ``python -m moebius.cli``."""

from __future__ import annotations

from moebius.cli.app import app
from moebius.memory import keep_freed_memory


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    app(prog_name="moebius")


if __name__ == "__main__":
    main()
