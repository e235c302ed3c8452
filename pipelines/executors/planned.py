"""What the loaders of all executors have in common: they follow the plan of their source."""

from __future__ import annotations

from sdpnet.pipelines.contract import Source
from sdpnet.pipelines.plan import Plan

__all__ = ["PlannedLoader"]


class PlannedLoader:
    """The base class of loaders. An executor that keeps something for an image size extends `set_plan`."""

    one_iterator = False
    source: Source

    def __len__(self) -> int:
        return len(self.source.plan)

    def set_plan(self, plan: Plan) -> None:
        self.source = self.source.with_plan(plan)

    def set_image_size(self, image_size: int) -> None:
        self.set_plan(self.source.plan.resized(image_size))
