"""The random decisions of training as data: counter-based draws and augmentation policies."""
