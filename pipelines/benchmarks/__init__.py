"""The race between pipelines: contestants, ceilings and the processes that time them."""
