"""The same recipe with another number of epochs: everything that is counted in epochs is scaled with them."""

from __future__ import annotations

from dataclasses import replace

from sdpnet.config.options import Config

__all__ = ["with_epochs"]

_SHORTEST_AVERAGE = 0.5  # a decay of 0 would switch the average off


def with_epochs(config: Config, epochs: int) -> Config:
    """Scales a recipe to another number of epochs, so that its schedule keeps its shape.

    The epochs of the warm-up, of the first cycle, of the growing images and without patch dropout keep their share of
    the training, rounded to whole epochs where they must be whole. The horizon of the average of the weights,
    1 / (1 - `ema.decay`) steps, keeps its share, too. A part that the recipe has is not rounded to nothing if there are
    enough epochs for it.

    Args:
        epochs: at least 1.
    """
    assert epochs >= 1, epochs
    share = epochs / config.train.epochs
    if share == 1:
        return config
    optim, growing, ema, train = config.optim, config.resolution, config.ema, config.train
    optim = replace(
        optim, warmup_epochs=min(optim.warmup_epochs * share, epochs), restart_epochs=optim.restart_epochs * share
    )
    full = min(max(1, round(train.full_patch_epochs * share)), epochs - 1) if train.full_patch_epochs else 0
    if growing.start_size and epochs == 1:
        growing = replace(growing, start_size=0)
    elif growing.start_size:
        end = min(max(1, round(growing.end_epoch * share)), epochs)
        growing = replace(growing, begin_epoch=min(round(growing.begin_epoch * share), end - 1), end_epoch=end)
    if ema.decay:
        ema = replace(ema, decay=max(_SHORTEST_AVERAGE, 1 - (1 - ema.decay) / share))
    train = replace(train, epochs=epochs, full_patch_epochs=full, eval_interval=min(train.eval_interval, epochs))
    return replace(config, optim=optim, resolution=growing, ema=ema, train=train)
