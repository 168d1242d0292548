"""`longseq check`: what a run would read and learn, before anything is computed."""
