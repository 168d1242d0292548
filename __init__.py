"""longseq: train language models on sequences that do not fit in memory."""

__version__ = "0.1.0"
