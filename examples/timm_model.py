"""Trains a model of timm with timm's optimizer and schedule, and with the augmentation of one of sdpnet's recipes.

python examples/timm_model.py --data SHARDS --model convnext_tiny --augment modern/sdpnet_l
"""

import argparse

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy

from sdpnet import ImageLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "model": "convnext_tiny", "augment": "modern/sdpnet_l", "image-size": 224, "lr": 1e-3}
    for name, default in {**options, "batch-size": 256, "epochs": 300, "warmup-epochs": 5}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()

    torch.manual_seed(0)
    size = {"image_size": args.image_size, "batch_size": args.batch_size}
    train = ImageLoader(args.data, "train", augment=args.augment, **size)  # targets: soft, mixed, smoothed
    val = ImageLoader(args.data, "val", **size)  # targets: indices of classes
    model = timm.create_model(args.model, num_classes=train.num_classes, drop_path_rate=0.1)
    model.to(train.device, memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=0.9999, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    lengths = {"num_epochs": args.epochs, "warmup_epochs": args.warmup_epochs, "updates_per_epoch": len(train)}
    schedule, _ = create_scheduler_v2(optimizer, "cosine", warmup_lr=1e-6, step_on_epochs=False, **lengths)
    criterion, step = SoftTargetCrossEntropy(), 0
    amp = torch.autocast(train.device.type, torch.bfloat16, enabled=train.device.type == "cuda")
    for epoch in range(args.epochs):
        losses = []
        model.train()
        for images, targets in train:
            with amp:
                loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
            average.update(model, step)
            losses.append(loss.detach())
        top1 = AverageMeter()
        average.module.eval()
        for images, labels in val:
            with torch.no_grad(), amp:
                top1.update(accuracy(average.module(images), labels)[0].item(), len(labels))
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, top-1 {top1.avg:.1f} %", flush=True)


if __name__ == "__main__":
    main()
