"""python -m headrace: the command line, where no script of that name is on the PATH."""

from headrace.cli.main import main

main()
