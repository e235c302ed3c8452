"""Trains torchvision's ResNet-18 in plain PyTorch. Started again, it continues at the batch of its last checkpoint.

python examples/plain_pytorch.py --data SHARDS --checkpoint plain.pt
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from sdpnet import ImageLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "checkpoint": "plain.pt", "save-every": 500}  # steps between two checkpoints
    for name, default in {**options, "image-size": 224, "batch-size": 256, "epochs": 90, "lr": 0.1}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()

    torch.manual_seed(0)
    size = {"image_size": args.image_size, "batch_size": args.batch_size}
    train, val = ImageLoader(args.data, "train", targets="index", **size), ImageLoader(args.data, "val", **size)
    model = resnet18(num_classes=train.num_classes).to(train.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    amp = torch.autocast(train.device.type, torch.bfloat16, enabled=train.device.type == "cuda")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": train}
    if os.path.exists(args.checkpoint):
        for name, state in torch.load(args.checkpoint, map_location=train.device).items():
            parts[name].load_state_dict(state)
        print(f"continues at step {schedule.last_epoch}, in epoch {train.epoch}")

    for epoch in range(train.epoch, args.epochs):
        losses = []
        model.train()
        for images, labels in train:  # the next epoch; after load_state_dict, from the batch of the state on
            with amp:
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if schedule.last_epoch % args.save_every == 0 or schedule.last_epoch == args.epochs * len(train):
                torch.save({name: part.state_dict() for name, part in parts.items()}, f"{args.checkpoint}.new")
                os.replace(f"{args.checkpoint}.new", args.checkpoint)
        model.eval()
        with torch.no_grad(), amp:
            hits = torch.stack([(model(images).argmax(1) == labels).sum() for images, labels in val]).sum()
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, top-1 {hits / val.num_samples:.1%}", flush=True)


if __name__ == "__main__":
    main()
