"""The subcommands of dog, one module per family of tasks; ``run(session)`` of a module does the work."""
