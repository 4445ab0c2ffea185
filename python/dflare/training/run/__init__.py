"""A run: its configuration, its steps, its snapshots, its evaluation."""
