"""The random decisions of training as data: counter-based draws and augmentation policies."""

__all__ = ["crop_boxes", "draws", "erasing", "mixing", "options", "policies", "sampling"]
