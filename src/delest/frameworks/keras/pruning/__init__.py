"""Keras networks made narrower: which channels belong together, what each is worth, and a functional model cloned without some of them."""
