"""Entry point of ``moebius`` and of ``python -m moebius.cli``."""

from __future__ import annotations

from moebius.cli.app import app


def main() -> None:
    """Run the command line."""
    app(prog_name="moebius")


if __name__ == "__main__":
    main()
