"""`python -m tinylm` is the command `tinylm`."""

from tinylm.cli import main

if __name__ == "__main__":
    main()
