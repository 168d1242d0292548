"""Triton kernels, a family a file: imported where a GPU is at hand, so that nothing else needs Triton."""
