"""The command `tinylm`, also as `python -m tinylm`. `tinylm run` starts without the rest of the kit."""

import sys


def main() -> None:
    """Entry point of the command."""
    if sys.argv[1:2] == ["run"]:
        from tinylm.engine.command import quick

        if quick(sys.argv[2:]):
            return
    from tinylm import cli

    cli.main()


if __name__ == "__main__":
    main()
