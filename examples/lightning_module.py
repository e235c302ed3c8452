"""Trains ResNet-18 with Lightning, on all GPUs of the machine. Started again, it continues at its last checkpoint.

python examples/lightning_module.py --data SHARDS --out lightning_run
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18

from sdpnet import ImageLoader


class Classifier(L.LightningModule):
    def __init__(self, num_classes: int, lr: float, images: dict) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = resnet18(num_classes=num_classes).to(memory_format=torch.channels_last)
        self.top1 = MulticlassAccuracy(num_classes, average="micro", ignore_index=-100)

    # Lightning asks for the loaders when each process knows its rank and device. It saves and restores their states.
    def train_dataloader(self) -> ImageLoader:
        return ImageLoader(split="train", targets="index", device=self.device, **self.hparams.images)

    def val_dataloader(self) -> ImageLoader:  # padded with the label -100, so that no process has fewer batches
        return ImageLoader(split="val", padding=True, device=self.device, **self.hparams.images)

    def training_step(self, batch: list, index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list, index: int) -> None:
        self.top1(self.model(batch[0]), batch[1])
        self.log("top1", self.top1, prog_bar=True)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "out": "lightning_run", "save-every": 500}  # a checkpoint each 500 steps
    for name, default in {**options, "image-size": 224, "batch-size": 256, "epochs": 90, "lr": 0.1}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    L.seed_everything(0)
    images = {"data": args.data, "image_size": args.image_size, "batch_size": args.batch_size}
    model = Classifier(ImageLoader(split="val", device="cpu", **images).num_classes, args.lr, images)
    saving = ModelCheckpoint(args.out, save_last=True, every_n_train_steps=args.save_every)
    amp = {"precision": "bf16-mixed"} if torch.cuda.is_available() else {}
    trainer = L.Trainer(max_epochs=args.epochs, callbacks=saving, logger=CSVLogger(args.out), **amp)
    trainer.fit(model, ckpt_path="last")
