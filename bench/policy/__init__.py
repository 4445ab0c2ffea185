"""The policy of widths against simulated and recorded load."""
