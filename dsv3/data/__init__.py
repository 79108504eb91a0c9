"""Text to batches: read a corpus, hold some of it out, train a tokenizer, pack token ids, draw batches.

`prepare` runs the whole way once and leaves a folder; `load_prepared` opens it; `SequenceSampler` turns its
training side into batches and `held_out_windows` its held-out side.
"""
