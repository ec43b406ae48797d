"""The ``overt`` command: one file a subcommand, thin."""
