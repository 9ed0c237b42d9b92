"""`python -m lighthouse_cli` runs the command `lighthouse`."""

from lighthouse_cli import main

if __name__ == "__main__":
    main()
