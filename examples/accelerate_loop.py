"""Trains ResNet-50 with Accelerate on any number of GPUs. Started again, it continues at its last checkpoint.

accelerate launch examples/accelerate_loop.py --data SHARDS --out accelerate_run
"""

import argparse
import glob
import os

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator

from sdpnet import ImageLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "out": "accelerate_run", "save-every": 5000, "model": "resnet50", "lr": 1e-3}
    for name, default in {**options, "image-size": 224, "batch-size": 256, "epochs": 90}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    # Accelerator initialises torch.distributed, from which the loaders take this process's rank.
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    images = {"image_size": args.image_size, "batch_size": args.batch_size, "device": accelerator.device}
    train = ImageLoader(args.data, "train", targets="index", **images)
    val = ImageLoader(args.data, "val", padding=True, **images)  # with the label -100, so that none has fewer batches
    model = torchvision.models.get_model(args.model, num_classes=train.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    model, optimizer = accelerator.prepare(model.to(memory_format=torch.channels_last), optimizer)  # not the loaders
    accelerator.register_for_checkpointing(schedule, train)
    for folder in sorted(glob.glob(f"{args.out}/*[0-9]"))[-1:]:
        accelerator.load_state(folder)
    for epoch in range(train.epoch, args.epochs):
        losses = []
        model.train()
        for batch, labels in train:
            loss = F.cross_entropy(model(batch), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if schedule.last_epoch % args.save_every == 0:
                folder = f"{args.out}/{schedule.last_epoch:08}"
                accelerator.save_state(f"{folder}.new")
                accelerator.wait_for_everyone()
                accelerator.on_main_process(os.rename)(f"{folder}.new", folder)
        model.eval()
        with torch.no_grad():
            hits = torch.stack([(model(batch).argmax(1) == labels).sum() for batch, labels in val]).sum()
        top1 = f"top-1 {accelerator.reduce(hits) / val.num_samples:.1%}"
        accelerator.print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, {top1}", flush=True)


if __name__ == "__main__":
    main()
