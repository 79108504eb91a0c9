"""The one exception a user is meant to read.

Everything that can go wrong because of what was *given* (a path, a file, an option, a checkpoint) raises
`UserError` with one sentence: what was given, what was expected, what to do. The command line prints that
sentence and exits with code 2; a library caller catches it as the `ValueError` it is. Anything else that
escapes is a defect of dsv3 and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do about it."""
