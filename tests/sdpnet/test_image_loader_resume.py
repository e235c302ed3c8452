"""The state of an `ImageLoader`: where it continues, on which machines, and what it refuses."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_batches import pipeline

from sdpnet import ImageLoader
from sdpnet.pipelines.errors import UserError

PIPELINES = [pipeline(name) for name in ("native", "torchvision", "dali", "ffcv", "synthetic")]
AUGMENT = {
    "randaugment": {"policy": "randaugment"},
    "erase": {"probability": 0.5, "mode": "pixel"},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}


def loader(data: Path, split: str = "train", **options: Any) -> ImageLoader:
    common: dict[str, Any] = {"image_size": 32, "batch_size": 4, "device": "cpu", "num_workers": 1, "return_ids": True}
    return ImageLoader(data, split, **{"pipeline": "torchvision", **common, **options})


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def through(way: str, state: dict[str, Any]) -> Any:
    """A state after a way to a file and back."""
    if way == "json":
        return json.loads(json.dumps(state))
    if way == "pickle":
        return pickle.loads(pickle.dumps(state))
    file = io.BytesIO()
    torch.save({"loader": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["loader"]


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_it_continues_at_any_batch_with_other_workers_and_worlds(name: str, split: str, shard_set: Path) -> None:
    """The same samples, pixels and targets as without an interruption, in this epoch and in the next one."""
    options: dict[str, Any] = {"pipeline": name, "augment": AUGMENT}
    with loader(shard_set, split, **options) as whole:
        states, batches = [], []
        for _ in range(2):
            for batch in whole:
                batches.append(batch)
                states.append(whole.state_dict())
    per_epoch = len(batches) // 2
    for done, state in enumerate(states[:per_epoch], 1):
        way = ("json", "pickle", "torch")[done % 3]
        with loader(shard_set, split, num_workers=3, prefetch_batches=1, **options) as again:
            again.load_state_dict(through(way, state))
            assert again.state_dict() == state and again.epoch == state["epoch"]
            rest = [*again, *again] if state["batch"] else [*again]
        assert all(same(a, b) for a, b in zip(rest, batches[done:], strict=True))
        if split == "train":
            ranks = [loader(shard_set, batch_size=2, rank=rank, world_size=2, **options) for rank in range(2)]
            for rank in ranks:
                rank.load_state_dict(state)
            for batch, *parts in zip(batches[done : done + per_epoch], *ranks, strict=False):
                assert same(batch, tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_continues(name: str, shard_set: Path) -> None:
    with loader(shard_set, pipeline=name, augment=AUGMENT) as whole:
        list(whole)
        iterator = iter(whole)
        for _ in range(3):
            next(iterator)
        state = whole.state_dict()
        rest = list(iterator)
    with loader(shard_set, pipeline=name, augment=AUGMENT, num_workers=2) as again:
        again.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(again, rest, strict=True))
        again.load_state_dict(state)  # also into a loader that has run
        assert all(same(a, b) for a, b in zip(again, rest, strict=True))


def test_worlds_may_change_where_some_ranks_have_fewer_batches(shard_set: Path) -> None:
    """10 samples in global batches of 4: in the last one, rank 1 of 2 has none."""
    whole = [ids.tolist() for *_, ids in loader(shard_set, "val")]
    ranks = [loader(shard_set, "val", batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [3, 2]
    iterators = [iter(rank) for rank in ranks]
    for done in range(1, 3):
        for iterator in iterators:
            next(iterator)
        states = [rank.state_dict() for rank in ranks]
        assert states[0] == states[1], "one process may save it for all"
        with loader(shard_set, "val") as one:
            one.load_state_dict(states[1])
            assert [ids.tolist() for *_, ids in one] == whole[done:]
    next(iterators[0])
    assert [next(iterator, None) for iterator in iterators] == [None, None]
    assert [rank.state_dict()["epoch"] for rank in ranks] == [1, 1]
    with loader(shard_set, "val", batch_size=2, rank=1, world_size=2) as late:
        late.load_state_dict(states[0])
        assert list(late) == [] and len(list(late)) == 2, "its epoch had ended; the next one is whole"


def test_states_at_the_edges_of_an_epoch(shard_set: Path) -> None:
    """As with torchdata's StatefulDataLoader, a state is about the newest iterator, and the next one begins there."""
    with loader(shard_set, pipeline="synthetic") as made:
        start = made.state_dict()
        assert (start["version"], start["epoch"], start["batch"]) == (1, 0, 0)
        iterator = iter(made)
        assert made.state_dict() == start, "nothing was taken yet"
        for done in range(1, 6):
            next(iterator)
            assert (made.state_dict()["epoch"], made.state_dict()["batch"]) == (0, done)
        next(iterator)
        end = made.state_dict()
        assert (end["epoch"], end["batch"]) == (1, 0), "the end of an epoch is the beginning of the next one"
        assert next(iterator, None) is None and made.state_dict() == end
        epochs = [[ids.tolist() for *_, ids in made] for _ in range(2)]
        for state, expected in ((end, epochs[0]), (start, None)):
            made.load_state_dict(state)
            assert made.state_dict() == state, "loading it and saving it again changes nothing"
            taken = [ids.tolist() for *_, ids in made]
            assert expected is None or taken == expected


def test_set_epoch_after_a_state_keeps_the_states_batch_in_that_epoch_alone(shard_set: Path) -> None:
    """Training frameworks call `set_epoch` at the beginning of the epoch that they continue."""
    with loader(shard_set, pipeline="synthetic") as made:
        made.set_epoch(7)
        whole = [ids.tolist() for *_, ids in made]
        made.set_epoch(7)
        iterator = iter(made)
        next(iterator), next(iterator)
        state = made.state_dict()
        for epochs, expected in (((7,), whole[2:]), ((7, 7), whole[2:]), ((8, 7), whole)):
            made.load_state_dict(state)
            for epoch in epochs:
                made.set_epoch(epoch)
            assert made.state_dict()["batch"] == (2 if expected != whole else 0)
            assert [ids.tolist() for *_, ids in made] == expected
            made.set_epoch(7)
            assert [ids.tolist() for *_, ids in made] == whole, "only the iterator after loading"
        made.load_state_dict(state)
        next(iterator)
        assert made.state_dict() == state, "an older iterator no longer counts"


ACTIONS = st.one_of(
    st.tuples(st.just("iter"), st.just(0)),
    st.tuples(st.just("next"), st.integers(1, 7)),
    st.tuples(st.just("set_epoch"), st.integers(0, 3)),
    st.tuples(st.just("save"), st.just(0)),
    st.tuples(st.just("load"), st.just(0)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=1, max_size=25))
def test_any_use_follows_a_simple_model(shard_set: Path, actions: list[tuple[str, int]]) -> None:
    """The model knows the place of the state, the place where the next iterator begins, and that of the iterator."""
    count = 6
    with loader(shard_set, pipeline="synthetic", dtype=torch.uint8) as made:
        plan = made.source.plan
        iterator, place, following, own, saved, counts = None, (0, 0), (0, 0), (0, 0), made.state_dict(), False
        saved_place, begun = (0, 0), False
        for action, number in actions:
            if action == "iter":
                iterator, begun, counts = iter(made), False, False
            elif action == "next" and iterator is not None:
                if not begun:
                    begun, own, place, following, counts = True, following, following, (following[0] + 1, 0), True
                for _ in range(number):
                    batch = next(iterator, None)
                    if own[1] == count or own[0] < 0:
                        assert batch is None
                        place = (own[0] + 1, 0) if counts and own[0] >= 0 else place
                        own = (-1, count)  # it has ended, and moves nothing any more
                        continue
                    assert batch is not None and batch[2].tolist() == plan.batch_ids(*own)[0].tolist()
                    own = own[0], own[1] + 1
                    place = own if counts else place
            elif action == "set_epoch":
                made.set_epoch(number)
                following = following if following[0] == number else (number, 0)
                place = following
            elif action == "save":
                saved, saved_place = json.loads(json.dumps(made.state_dict())), place
                saved_place = place if place[1] < count else (place[0] + 1, 0)
            elif action == "load":
                made.load_state_dict(saved)
                place = following = saved_place
                counts = False
            state = made.state_dict()
            assert (state["epoch"], state["batch"]) == (place if place[1] < count else (place[0] + 1, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed is 0 in the state and 1 here"),
        ({"batch_size": 6}, "global_batch_size is 4 in the state and 6 here"),
        ({"rank": 0, "world_size": 2}, "global_batch_size is 4 in the state and 8 here"),
        ({"order": "blocks"}, "order is 'random' in the state and 'blocks' here"),
        (
            {"train": False},
            "order is 'random' in the state and 'sequential' here; train is True in the state and False",
        ),
        ({"split": "val", "train": True}, "num_samples is 24 in the state and 10 here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_state_of_another_order_is_refused_by_name(options: dict[str, Any], message: str, shard_set: Path) -> None:
    state = loader(shard_set).state_dict()
    with loader(shard_set, **options) as other:
        before = other.state_dict()
        with pytest.raises(UserError) as caught:
            other.load_state_dict(state)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert other.state_dict() == before, "the loader does not change"


def test_a_state_of_other_images_is_refused(shard_set: Path, tar_set: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"the data set \(its fingerprint\) is '[0-9a-f]{15}\.\.\. in the state and '[0-9a-f]{15}\.\.\.",
    ):
        loader(tar_set).load_state_dict(loader(shard_set).state_dict())


@pytest.mark.parametrize(
    "changes", [{"pipeline": "synthetic"}, {"num_workers": 2}, {"dtype": torch.uint8}, {"image_size": 48}]
)
def test_what_does_not_change_the_order_may_differ(changes: dict[str, Any], shard_set: Path) -> None:
    loader(shard_set, **changes).load_state_dict(loader(shard_set).state_dict())


NO_STATES: list[Any] = [
    None,
    3,
    "state",
    [],
    {},
    {"epoch": 0, "batch": 0},
    {"model": {}, "optimizer": {}},
    ("version", 2),
    ("version", "1"),
    ("epoch", -1),
    ("epoch", 1.0),
    ("epoch", True),
    ("epoch", 1 << 70),
    ("batch", -1),
    ("batch", None),
    ("batch", 7),
    ("order", None),
    ("order", {}),
    ("order", {"seed": 0}),
]


@pytest.mark.parametrize("wrong", NO_STATES, ids=repr)
def test_what_is_no_state_is_refused(wrong: Any, shard_set: Path) -> None:
    with loader(shard_set, pipeline="synthetic") as made:
        state = {**made.state_dict(), wrong[0]: wrong[1]} if isinstance(wrong, tuple) else wrong
        with pytest.raises(UserError, match=r"^load_state_dict: ") as caught:
            made.load_state_dict(state)
        assert "\n" not in str(caught.value)
        for number in (-1, 1.5, "1", None, True):
            with pytest.raises(UserError, match=r"^epoch = "):
                made.set_epoch(number)  # type: ignore[arg-type]
