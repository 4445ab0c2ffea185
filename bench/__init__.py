"""What is measured: kernels, serving, the policy, training."""
