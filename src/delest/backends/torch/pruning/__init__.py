"""Making a PyTorch network narrower: which units it has, what they are worth, cutting them off, and building the narrower network again."""
