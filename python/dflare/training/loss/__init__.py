"""What is minimised, and what is counted beside it."""
