"""Is a tree exact for this model? A small forest both ways, within what rounding explains."""
