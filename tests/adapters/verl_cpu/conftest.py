"""Only where verl is installed: `make test-verl`. Every process of a run, and this one, takes the CPU for a GPU."""

from importlib.util import find_spec

if find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import dta_plugin.adapters.verl_cpu  # noqa: F401
