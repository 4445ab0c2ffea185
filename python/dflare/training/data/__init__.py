"""What is learned from: prompts, the target's answers to them, its hidden states."""
