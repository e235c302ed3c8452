"""Fine-tunes a pretrained ResNet-18 on classes of unequal size: all are drawn equally often and count equally.

python examples/balanced_finetuning.py --data SHARDS --subset 0.1 --weights plain.pt  # default: torchvision's
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from sdpnet import ImageLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "weights": "", "subset": 1.0, "image-size": 224, "batch-size": 128}
    for name, default in {**options, "epochs": 10, "lr": 0.05}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()

    torch.manual_seed(0)
    size = {"image_size": args.image_size, "batch_size": args.batch_size}
    balanced = {"weights": "balanced", "subset": args.subset, "targets": "index"}
    train, val = ImageLoader(args.data, "train", **balanced, **size), ImageLoader(args.data, "val", **size)
    saved = torch.load(args.weights, map_location="cpu") if args.weights else ResNet18_Weights.DEFAULT.get_state_dict()
    model = resnet18()
    model.load_state_dict({k: v for k, v in saved.get("model", saved).items() if k[:3] != "fc."}, strict=False)
    body = list(model.parameters())[:-2]  # all but the head
    model.fc = nn.Linear(model.fc.in_features, train.num_classes)
    model.to(train.device, memory_format=torch.channels_last)
    rates = [{"params": body, "lr": args.lr / 10}, {"params": model.fc.parameters(), "lr": args.lr}]
    optimizer = torch.optim.SGD(rates, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    amp = torch.autocast(train.device.type, torch.bfloat16, enabled=train.device.type == "cuda")
    for epoch in range(args.epochs):
        losses, drawn, hits, total = [], *torch.zeros(3, train.num_classes, dtype=torch.int64, device=train.device)
        model.train()
        for images, labels in train:
            with amp:
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            drawn.index_add_(0, labels, torch.ones_like(labels))
        model.eval()
        for images, labels in val:
            with torch.no_grad(), amp:
                hits.index_add_(0, labels, (model(images).argmax(1) == labels).long())
            total.index_add_(0, labels, torch.ones_like(labels))
        top1 = f"mean top-1 of the classes {(hits / total).mean():.1%}, drawn of each {drawn.tolist()}"
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, {top1}", flush=True)


if __name__ == "__main__":
    main()
