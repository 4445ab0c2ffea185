"""`python -m dflare.cli`, the same as `dflare`."""

from dflare.cli import main

main()
