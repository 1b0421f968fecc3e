"""The one error that a user can cause and mend.

Everything else that goes wrong is a fault of the program and keeps its traceback.
"""


class InputError(ValueError):
    """What was asked for cannot be done; the message is the one line a user needs.

    Its form is ``<key as typed> is <value>, but <rule>; <what to do>``. The command
    prints it without a traceback and exits with code 2, before any work has started.
    """
