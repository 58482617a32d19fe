"""`python -m whatmatters` is the command line."""

from whatmatters.cli.main import main

if __name__ == "__main__":
    main()
