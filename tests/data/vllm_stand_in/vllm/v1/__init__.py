"""A package of the path to the workers."""
