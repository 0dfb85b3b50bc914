"""What LET costs and what it brings, measured: the `let-bench` command."""
