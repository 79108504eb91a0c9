"""Text to batches, as the report prepares it (section 4.1).

`prepare` reads sources, holds some text out, trains a tokenizer if it is given none, and leaves a folder of token
ids; `load_prepared` opens it; `SequenceSampler` turns its training side into batches and `held_out_windows` its
held-out side; `document_mask` keeps attention inside documents.
"""
