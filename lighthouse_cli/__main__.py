"""`python -m lighthouse_cli` is the command `lighthouse`."""

from lighthouse_cli import main

if __name__ == "__main__":
    main()
