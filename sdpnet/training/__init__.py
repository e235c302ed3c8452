"""The parts of a training: its set-up, one step, evaluation, and starting from another model."""
