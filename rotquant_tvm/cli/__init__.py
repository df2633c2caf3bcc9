"""The ``tvmc`` command line, one file per subcommand."""
