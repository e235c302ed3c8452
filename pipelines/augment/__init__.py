"""The device stage: decoded uint8 batches in, normalised and mixed batches for the model out, on the batch's device."""

from sdpnet.pipelines.augment.stage import DeviceStage

__all__ = ["DeviceStage"]
