"""The command ``blockdrop``, a module a subcommand."""
