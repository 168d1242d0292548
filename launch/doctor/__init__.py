"""`longseq doctor`: what of this machine would stop a run, slow it down or make it wrong."""

from .command import EXAMINED, doctor, examine

__all__ = ["EXAMINED", "doctor", "examine"]
