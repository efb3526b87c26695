"""`python -m hagd.tables`."""

from hagd.tables.command import main

main()
