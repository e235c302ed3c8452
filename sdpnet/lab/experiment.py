"""An experiment: what is compared, and the trainings of each of its rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, get_args

import yaml

from sdpnet.config.load import absolute_paths, dump_config
from sdpnet.config.options import Config
from sdpnet.config.setting import text_setting
from sdpnet.config.yaml_text import read_yaml
from sdpnet.flags.lab import Equal
from sdpnet.lab.compute import equally_long, training_macs
from sdpnet.lab.variants import Variant, load_variant
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.files.atomic_write import publish_bytes

__all__ = ["Experiment", "Training", "is_experiment", "read_experiment", "trainings_of", "write_experiment"]

_FILE: Final = "lab.yaml"
_MOST_ROUNDS: Final = 10


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Attributes:
        config: the baseline's config, a name from configs/ or a path.
        data: the shard set.
        settings: texts "section.key=value" for the baseline and all variants.
        baseline: the baseline's name in tables.
        variants: what is compared with it.
        seeds: the number of trainings of each variant, with the seeds 0, 1, ...
        epochs: those of the baseline in the last round; None takes its config's.
        equal: what is the same for all variants (see `sdpnet.lab.compute.equally_long`).
        rounds: the number of rounds of successive halving (Jamieson and Talwalkar, 2016); 1 is without. Each round
            takes twice the epochs of the round before it, and gets the better half of its variants.
    """

    config: str
    data: str
    settings: tuple[str, ...]
    baseline: str
    variants: tuple[Variant, ...]
    seeds: int = 3
    epochs: int | None = None
    equal: Equal = "compute"
    rounds: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.seeds <= 1000, "--seeds", self.seeds, "from 1 to 1000")
        require(1 <= self.rounds <= _MOST_ROUNDS, "--rounds", self.rounds, f"from 1 to {_MOST_ROUNDS}")
        require(self.epochs is None or self.epochs >= 1, "--epochs", self.epochs, "at least 1")
        if self.equal not in get_args(Equal):
            raise UserError(f"--equal {self.equal}: must be one of {', '.join(get_args(Equal))}")

    @property
    def everyone(self) -> tuple[Variant, ...]:
        """The baseline, then the variants."""
        return (Variant(self.baseline), *self.variants)

    def configs(self, num_classes: int, round: int | None = None) -> dict[str, Config]:
        """The configs of the baseline and all variants by name, as they are trained in a round (by default the last).

        Raises `UserError` if one of them is not valid.
        """
        settings = [*self.settings, text_setting("data.path", self.data)]
        baseline = absolute_paths(load_variant(Variant(self.baseline), self.config, settings))
        share = 1.0 if round is None else 0.5 ** (self.rounds - 1 - round)
        own = share * (1 if self.epochs is None else self.epochs / baseline.train.epochs)
        found = {}
        for variant in self.everyone:
            config = absolute_paths(load_variant(variant, self.config, settings))
            found[variant.name] = equally_long(config, baseline, self.equal, own, num_classes)
        return found

    def survivors(self, scores: Mapping[str, float]) -> list[str]:
        """The names that go into the next round: the baseline and the better half of the variants, rounded up.

        Args:
            scores: the mean differences from the baseline by variant; a variant without one is not taken.
        """
        ranked = sorted(scores, key=lambda name: -scores[name])
        kept = set(ranked[: -(-len(ranked) // 2)])
        return [variant.name for variant in self.everyone if variant.name in kept or variant.name == self.baseline]


@dataclass(frozen=True)
class Training:
    """One training of an experiment.

    Attributes:
        variant: its name.
        seed: the seed of weights and plan, the same for all variants.
        round: 0, 1, ...
        config: what is trained, with the seed.
        compute: its operations as a multiple of the baseline's in the last round.
        directory: where it is written.
    """

    variant: str
    seed: int
    round: int
    config: Config
    compute: float
    directory: Path

    @property
    def config_text(self) -> str:
        return dump_config(self.config)


def trainings_of(
    experiment: Experiment, round: int, names: Sequence[str], num_classes: int, out: Path
) -> Iterator[Training]:
    """The trainings of a round, one seed after the other, so that an interrupted round has all variants equally often.

    Args:
        names: the variants that are in this round.
        out: the directory of the experiment.
    """
    configs = experiment.configs(num_classes, round)
    whole = training_macs(experiment.configs(num_classes)[experiment.baseline], num_classes)
    folders = {variant.name: variant.folder for variant in experiment.everyone}
    for seed in range(experiment.seeds):
        for name in names:
            config = replace(configs[name], seed=seed)
            epochs = config.train.epochs
            # One evaluation, at the end: the others would cost time and decide nothing.
            train = replace(config.train, eval_interval=epochs, keep_checkpoints=1, keep_best=False)
            config = replace(config, train=train)
            directory = out / "runs" / f"{folders[name]}-{epochs}ep-seed{seed}"
            yield Training(name, seed, round, config, training_macs(config, num_classes) / whole, directory)


def write_experiment(out: Path, experiment: Experiment) -> None:
    """Writes OUT/lab.yaml, with which `sdpnet lab --out OUT` continues."""
    values = asdict(experiment)
    values["settings"] = list(experiment.settings)
    values["variants"] = [{**asdict(variant), "settings": list(variant.settings)} for variant in experiment.variants]
    publish_bytes(out / _FILE, yaml.safe_dump(values, sort_keys=False).encode())


def is_experiment(out: Path) -> bool:
    """Whether a directory holds an experiment."""
    return (out / _FILE).is_file()


def read_experiment(out: Path) -> Experiment:
    """The experiment in a directory. Raises `UserError` if there is none."""
    path = out / _FILE
    if not is_experiment(out):
        raise UserError(f"{out}: holds no experiment to continue; to begin one, pass --config, --data and --variant")
    try:
        values = read_yaml(path)
        variants = tuple(Variant(one["name"], tuple(one["settings"]), one["config"]) for one in values.pop("variants"))
        return Experiment(**{**values, "settings": tuple(values["settings"]), "variants": variants})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as an experiment: {' '.join(str(error).split())[:200]}") from None
