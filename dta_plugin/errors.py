"""The two exceptions of the package. Both messages say what was given, what was expected and what to do."""


class InvalidInputError(ValueError):
    """An argument, option or batch that cannot be used as given."""


class UnsupportedModelError(RuntimeError):
    """A model, setting or version for which prefix-tree execution would not be exact."""
