"""A small model like the user's own, with the user's settings, against plain PyTorch in float64."""
