"""``python -m overt`` is the ``overt`` command."""

from overt.cli.main import main

main()
