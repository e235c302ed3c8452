"""Pretrains a ResNet-50 without labels: SimSiam (Chen and He, 2021), with SwAV's small crops as further views.

python examples/two_views.py --data SHARDS --out backbone.pt
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from sdpnet import ImageLoader


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"data": "SHARDS", "out": "backbone.pt", "model": "resnet50", "image-size": 224, "small-size": 96}
    for name, default in {**options, "batch-size": 256, "epochs": 100, "lr": 0.05}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    distort = {"randaugment": {"policy": "three"}}  # greyscale, solarize or blur, then a colour jitter
    large = {"image_size": args.image_size, "crop": {"scale": [0.2, 1.0]}, "augment": distort}
    small = {"image_size": args.small_size, "crop": {"scale": [0.05, 0.2]}, "augment": distort}
    train = ImageLoader(args.data, "train", batch_size=args.batch_size, views=[large, large, small, small])
    backbone = torchvision.models.get_model(args.model).to(memory_format=torch.channels_last)
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    encoder = nn.Sequential(backbone, mlp(width, width), nn.BatchNorm1d(width, affine=False)).to(train.device)
    predictor = mlp(width, width // 4).to(train.device)
    lr, weights = args.lr * args.batch_size / 256, [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train))
    amp = torch.autocast(train.device.type, torch.bfloat16, enabled=train.device.type == "cuda")
    for epoch in range(args.epochs):
        losses, spreads = [], []
        for views, _ in train:  # the same images in each of the views, with crops and draws of their own
            with amp:
                codes = [encoder(view) for view in views]
                guesses = [predictor(code) for code in codes]  # of the codes of the other large views
                pairs = [(guess, codes[k].detach()) for n, guess in enumerate(guesses) for k in (0, 1) if n != k]
                loss = -torch.cat([F.cosine_similarity(guess, code) for guess, code in pairs]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            spreads.append(F.normalize(codes[0].detach()).std(0).mean() * width**0.5)
        spread = f"spread of the codes {torch.stack(spreads).mean():.2f}"  # 0: they have all become equal
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, {spread}", flush=True)
        torch.save(backbone.state_dict(), args.out)


if __name__ == "__main__":
    main()
