"""Files to documents to tokens on disk to packed sequences."""
