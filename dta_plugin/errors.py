"""The exceptions of the package. Messages say what was given, what was expected and what to do."""


class InvalidInputError(ValueError):
    """An argument, option or batch that cannot be used as given."""


class UnsupportedError(RuntimeError):
    """A model, setting or version for which prefix-tree execution would not be exact."""


def not_exact(reason: str) -> UnsupportedError:
    """The refusal of what `on_unsupported` decides about, to be raised. reason: "what; remedy"."""
    return UnsupportedError(f"Prefix-tree execution is not exact here: {reason}; or on_unsupported='dense'.")


class VerificationError(AssertionError):
    """The tree and the dense path differ by more than rounding explains."""
