"""The command line: one program, its verbs in groups, each importing what it needs when it runs."""
