"""What serves every vendor: core <- kernels, dispatch <- ops <- step."""
