"""The training loop: text in, a run folder out."""
