"""`python -m let_plugin.bench`: as `let-bench`."""

from let_plugin.bench.cli import main

if __name__ == "__main__":
    main()
