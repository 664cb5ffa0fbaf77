"""The only place that knows framework names: one package per framework."""
