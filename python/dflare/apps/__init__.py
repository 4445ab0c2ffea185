"""What the commands run: serving a pair, comparing it, the demo, the diagnosis."""
