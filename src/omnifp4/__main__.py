"""``python -m omnifp4``: the command line."""

from omnifp4.cli.main import run

run()
