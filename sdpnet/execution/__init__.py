"""How a step is executed on this hardware: dtype, memory format, compilation, micro-batches, threads."""
