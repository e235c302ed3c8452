"""SdP-Net through torch.hub: torch.hub.load(REPOSITORY, "sdpnet_xl", checkpoint="RUN").

`checkpoint` is a run's directory or its `model.safetensors`, whose `model.json` says how the model was built.
`overrides` (fields of `sdpnet.model.options.ModelOptions`) change that: other classes start the head's last layer anew,
another `grid_size` resamples a learned position embedding. Without `checkpoint` the model is randomly initialised.
"""

# Imported under names that torch.hub does not take for entry points.
from dataclasses import replace as _replace

from sdpnet.checkpoints import load_model as _load_model
from sdpnet.model import MODELS as _MODELS
from sdpnet.model import SdPNet as _SdPNet
from sdpnet.model import create_model as _create_model
from sdpnet.model import create_model_options as _create_model_options
from sdpnet.pipelines.errors import UserError as _UserError
from sdpnet.training.finetune import start_from as _start_from

dependencies = ["numpy", "safetensors", "torch"]


def _load(name: str, checkpoint: str | None, overrides: dict) -> _SdPNet:
    _create_model_options(name, **overrides)  # a mistake in them is said before anything is read
    if checkpoint is None:
        return _create_model(name, **overrides)
    options = _load_model(checkpoint)[1].model
    for key in ("conv_blocks", "transformer_blocks"):
        if key not in overrides and getattr(options, key) != getattr(_MODELS[name], key):
            raise _UserError(f"{checkpoint}: is no {name}: its {key} is {getattr(options, key)}")
    model = _SdPNet(_replace(options, **overrides))
    _start_from(model, checkpoint)
    return model


def sdpnet_l(checkpoint: str | None = None, **overrides: object) -> _SdPNet:
    """5 conv and 7 transformer blocks, 55.1 M parameters."""
    return _load("sdpnet_l", checkpoint, overrides)


def sdpnet_xl(checkpoint: str | None = None, **overrides: object) -> _SdPNet:
    """5 conv and 10 transformer blocks, 76.4 M parameters."""
    return _load("sdpnet_xl", checkpoint, overrides)


def sdpnet_xxl(checkpoint: str | None = None, **overrides: object) -> _SdPNet:
    """20 conv and 10 transformer blocks, 85.9 M parameters."""
    return _load("sdpnet_xxl", checkpoint, overrides)
