"""The one exception that is meant for users: a sentence that says what is wrong and what to do."""


class FoveateError(ValueError):
    """Wrong input by the user. The command line prints its message and exits with code 2."""
