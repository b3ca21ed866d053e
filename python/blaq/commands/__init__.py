"""The subcommands of ``blaq``, one module each (``blaq.cli`` lists them)."""
