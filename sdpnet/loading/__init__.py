"""The loader for any training loop: images and targets on the device, ready for a model."""

__all__ = ["arguments", "decode_batch", "device_augment", "epochs", "feed", "image_loader", "output", "state"]
