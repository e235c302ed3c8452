"""The device stage: turns decoded uint8 batches into normalised and mixed batches for the model, on their device."""

from sdpnet.pipelines.augment.stage import DeviceStage

__all__ = ["DeviceStage"]
