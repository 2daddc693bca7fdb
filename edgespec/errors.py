"""The errors a user can see: each says what is wrong and what to type next, and nothing else is printed."""


class EdgespecError(Exception):
    """A fault with a remedy: `message` is what is wrong (value and origin), `hint` is what to do next."""

    exit_code = 2

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.message}\nhint:  {self.hint}"


class InputError(EdgespecError):
    """A flag, a checkpoint or a file that the user gave cannot be used."""


class BundleError(EdgespecError):
    """A bundle is damaged, unsafe or of another version."""


class MismatchError(EdgespecError):
    """The answer is no: an exported graph does not do what its source does."""

    exit_code = 1


class BackendError(EdgespecError):
    """The machine cannot do it: no disk, no memory, a missing library."""
