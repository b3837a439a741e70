"""A site trains on all of its own folder, whatever the task, and the server needs no folder."""

import csv

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from PIL import Image
from scipy.io import wavfile

from clients.app import app, build, forget_trainers
from clients.data import NO_EXAMPLES, Examples, Subset, Task
from clients.settings import ParticipantSettings
from clients.tasks import digits, imagefolder, mnist, registry, speech, toxic
from clients.tasks.own_data import with_held_out
from clients.tasks.words import FIRST_WORD, HashedNumbers
from flwr_colearn import ColearnError, InProcessGrid, LocalPlan
from flwr_colearn.records import to_record

torch.set_num_threads(1)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    forget_trainers()


def write_arrays(shape, dtype=np.uint8, highest=255):
    def write(folder, n, part="train"):
        x = RNG.integers(0, highest + 1, (n, *shape)).astype(dtype)
        np.savez(folder / f"{part}.npz", x=x, y=np.arange(n) % 3)

    return write


def write_images(folder, n, part="train"):
    for index in range(n):
        path = folder / part / ("cat", "dog", "owl")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)


def write_clips(folder, n, part=""):
    """All clips are one speaker's, who would be in one part of the data set's own split."""
    for index in range(n):
        path = folder / part / ("no", "yes")[index % 2] / f"00aa_nohash_{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(path, 16000, RNG.integers(-3000, 3000, 16000).astype(np.int16))


def write_comments(folder, n, part="train"):
    labels = [[index % 2, 0, index % 3 == 0, 0, 0, 0] for index in range(n)]
    rows = [[f"{i}", f"word{i} word{i % 4}", *map(int, labels[i])] for i in range(n)]
    header = ["id", "comment_text", *toxic.LABELS]
    names = {"train": [("train.csv", header, slice(None))], "test": [
        ("test.csv", header[:2], slice(2)),
        ("test_labels.csv", ["id", *toxic.LABELS], [0, *range(2, 8)]),
    ]}  # fmt: skip
    for name, columns, chosen in names[part]:
        with (folder / name).open("w", newline="") as file:
            picked = (np.array(row, object)[chosen].tolist() for row in rows)
            csv.writer(file).writerows([columns, *picked])


def write_tags(folder, n, part="train"):
    y = np.arange(n * 3).reshape(n, 3) % 2
    x = RNG.normal(size=(n, 240, 64)).astype(np.float32)
    np.savez(folder / f"{'eval' if part == 'test' else part}.npz", x=x, y=y)


WRITERS = {
    "digits": (write_arrays((8, 8), highest=16), {}),
    "mnist": (write_arrays((28, 28)), {}),
    "cifar10": (write_arrays((32, 32, 3)), {}),
    "imagefolder": (
        write_images,
        {"classes": "ape,cat,dog,owl", "image-size": 32, "model": "resnet8"},
    ),
    "speech": (write_clips, {"classes": "go,no,yes"}),
    "toxic": (write_comments, {"model": "bigru-small", "vocabulary": 50}),
    "audioset": (write_tags, {"classes": "a,b,c"}),
}
each_task = pytest.mark.parametrize("task", WRITERS)


def site(tmp_path, task, n=23, name="site", **config):
    write, settings = WRITERS[task]
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    write(folder, n)
    run_config = {"task": task, **settings, **config}
    return folder, run_config


def context_of(folder, run_config, **node_config):
    config = {"data-dir": str(folder), "name": folder.name, **node_config}
    return Context(1, 7, config, RecordDict(), run_config)


def number_of(examples):
    return len(examples)


@each_task
def test_a_site_trains_on_all_of_its_own_examples_but_those_held_out(tmp_path, task, flower_log):
    folder, run_config = site(tmp_path, task)
    trainer = build(context_of(folder, run_config))
    assert (len(trainer.train_set), len(trainer.test_set)) == (21, 2)  # a tenth of 23 is held out
    assert f"in {folder}, 2 held out" in flower_log.text
    assert "21 training examples" in flower_log.text
    assert trainer.evaluate()["num-examples"] == 2


@each_task
def test_a_sites_own_test_set_is_what_it_evaluates_on(tmp_path, task, flower_log):
    folder, run_config = site(tmp_path, task)
    WRITERS[task][0](folder, 6, "test")
    trainer = build(context_of(folder, run_config))
    assert (len(trainer.train_set), len(trainer.test_set)) == (23, 6)
    assert "6 to test on" in flower_log.text


@each_task
def test_the_server_starts_without_any_folder_and_sites_train_its_model(
    tmp_path, task, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # no folder "data" here
    monkeypatch.setattr("torchvision.datasets.utils.download_url", None)  # nothing is downloaded
    folder, run_config = site(tmp_path, task)
    settings = ParticipantSettings.from_config(run_config)
    definition = registry.server_task(settings)
    # Only scikit-learn's digits come with their package.
    assert len(definition.test_set) == (500 if task == "digits" else 0)
    arrays = to_record(registry.server_trainer(settings, definition).get_weights())
    grid = InProcessGrid(app, 1, run_config=run_config)
    grid.contexts[1].node_config = {"data-dir": str(folder), "name": "utrecht"}
    plan = ConfigRecord(LocalPlan(1, 1, 0.01).to_config())
    content = RecordDict({"arrays": arrays, "config": plan})
    [reply] = grid.send_and_receive([Message(content, 1, "train")])
    assert reply.has_content(), reply.error
    assert reply.content["metrics"]["num-examples"] in (21, 20)  # a last batch of one is left out
    [reply] = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, "evaluate")])
    assert reply.content["metrics"]["num-examples"] == 2


@each_task
def test_a_server_with_a_test_set_evaluates_on_it(tmp_path, task):
    if task == "digits":
        pytest.skip("the server always has the digits that come with scikit-learn")
    _, run_config = site(tmp_path, task)
    server = tmp_path / "server"
    server.mkdir()
    WRITERS[task][0](server, 6, "test")
    settings = ParticipantSettings.from_config({**run_config, "data-dir": str(server)})
    definition = registry.server_task(settings)
    assert (len(definition.train_set), len(definition.test_set)) == (0, 6)
    assert registry.server_trainer(settings, definition).evaluate()["num-examples"] == 6


def test_held_out_examples_and_training_examples_are_all_of_them_once(tmp_path):
    folder, run_config = site(tmp_path, "cifar10", n=40)
    with np.load(folder / "train.npz") as file:
        images = [image.tobytes() for image in file["x"]]
    for seed in (0, 1):
        settings = ParticipantSettings.from_config(
            {**run_config, "data-dir": str(folder), "held-out": 0.25, "seed": seed}
        )
        task = registry.own_task(settings)
        train, test = (
            [x.tobytes() for x in part.inputs] for part in (task.train_set, task.test_set)
        )
        assert (len(train), len(test)) == (30, 10)
        assert sorted(train + test) == sorted(images)
        again = registry.own_task(settings)
        np.testing.assert_array_equal(again.test_set.inputs, task.test_set.inputs)
        if seed == 0:
            first = set(test)
    assert set(test) != first


def test_a_share_of_zero_evaluates_on_the_training_examples(tmp_path, flower_log):
    folder, run_config = site(tmp_path, "cifar10")
    trainer = build(context_of(folder, {**run_config, "held-out": 0.0}))
    assert len(trainer.train_set) == len(trainer.test_set) == 23
    assert "none held out" in flower_log.text


@pytest.mark.parametrize(
    ("settings", "n", "message"),
    [
        ({"held-out": 1.0}, 5, "'held-out': expected at least 0 and below 1, found 1.0"),
        ({"held-out": -0.1}, 5, "'held-out': expected at least 0"),
        ({}, 1, "expected at least two training examples, of which one is held out, found 1"),
    ],
)
def test_nothing_to_train_on_is_refused(tmp_path, settings, n, message):
    folder, run_config = site(tmp_path, "cifar10", n=n)
    with pytest.raises(ColearnError, match=message):
        build(context_of(folder, {**run_config, **settings}))


# What the sites agree on


def test_labels_are_the_runs_classes_whatever_folders_a_site_has(tmp_path):
    """By their own folders' order, cat would be 0 at the first site and 1 at the second."""
    numbers = {}
    for name, classes in (("one", ("cat", "dog", "go")), ("two", ("bird", "cat", "dog"))):
        for label in classes:
            for index in range(4):
                path = tmp_path / name / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        settings = ParticipantSettings(task="imagefolder", classes="bird, cat,dog ,go")
        examples = imagefolder.read(settings, tmp_path / name, "train")
        for path, label in zip(examples.inputs, examples.labels, strict=True):
            numbers.setdefault(path.split("/")[-2], set()).add(int(label))
    assert numbers == {"bird": {0}, "cat": {1}, "dog": {2}, "go": {3}}


@pytest.mark.parametrize("task", ["imagefolder", "speech"])
def test_an_unknown_class_is_refused_by_name(tmp_path, task):
    folder, run_config = site(tmp_path, task)
    with pytest.raises(ColearnError, match=r"expected the classes .*found others: (owl|yes)"):
        build(context_of(folder, {**run_config, "classes": "cat,dog,no"}))


@pytest.mark.parametrize("task", ["imagefolder", "speech"])
def test_without_agreed_classes_neither_side_starts(tmp_path, task):
    folder, run_config = site(tmp_path, task, classes="")
    with pytest.raises(ColearnError, match=r"'classes': expected the names of all classes"):
        build(context_of(folder, run_config))
    with pytest.raises(ColearnError, match=r"'classes': expected the names of all classes"):
        registry.server_task(ParticipantSettings(task=task, data_dir=str(tmp_path / "nothing")))


def test_a_class_twice_is_refused():
    with pytest.raises(ColearnError, match="'classes': expected every name once"):
        _ = ParticipantSettings(classes="cat,dog,cat").class_names


def test_an_empty_folder_and_hidden_ones_are_no_classes(tmp_path):
    folder, run_config = site(tmp_path, "imagefolder")
    (folder / "train" / "notes").mkdir()
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / ".cache" / "x.png").write_bytes(b"x")
    assert len(build(context_of(folder, run_config)).train_set) == 21


def test_class_folders_may_be_in_the_sites_folder_itself(tmp_path):
    write_images(tmp_path / "a", 12, ".")
    write_images(tmp_path / "a", 3, "val")
    settings = ParticipantSettings(task="imagefolder", classes="cat,dog,owl")
    train, test = (imagefolder.read(settings, tmp_path / "a", part) for part in ("train", "test"))
    assert (len(train), len(test)) == (12, 3)


def test_the_constants_of_normalisation_are_the_runs(tmp_path):
    pixels = np.full((2, 28, 28), 255, np.uint8)
    np.savez(tmp_path / "train.npz", x=pixels, y=np.array([0, 1]))
    examples = mnist.read(ParticipantSettings(), tmp_path, "train")
    np.testing.assert_allclose(examples.inputs, (1 - 0.1307) / 0.3081, rtol=1e-6)


def test_hashed_words_have_the_same_number_at_every_site_and_in_every_version(tmp_path):
    numbers = HashedNumbers(1000)
    # CRC-32 of these bytes is published with its definition: "123456789" gives 0xCBF43926.
    assert numbers.get("123456789", 1) == FIRST_WORD + 0xCBF43926 % 1000
    tasks = []
    for n in (5, 40):
        folder, run_config = site(tmp_path, "toxic", n=n, name=f"site{n}")
        settings = ParticipantSettings.from_config({**run_config, "data-dir": str(folder)})
        tasks.append(toxic.read(settings, folder, "train"))
    np.testing.assert_array_equal(tasks[0].inputs, tasks[1].inputs[:5])
    assert tasks[1].inputs.max() < FIRST_WORD + 50


def test_a_file_of_words_is_the_vocabulary(tmp_path):
    (tmp_path / "words.txt").write_text("word1\n\nword3\nWORD1\nword0\n")
    folder, run_config = site(tmp_path, "toxic")
    settings = ParticipantSettings.from_config(
        {**run_config, "vocabulary-file": str(tmp_path / "words.txt")}
    )
    examples = toxic.read(settings, folder, "train")
    assert examples.inputs[:4, :2].tolist() == [[4, 4], [2, 2], [1, 1], [3, 3]]
    assert toxic.definition(settings).model_options["vocabulary"] == FIRST_WORD + 3


def test_a_site_with_another_file_of_vectors_is_refused(tmp_path):
    for name, second in (("server.vec", "0.5"), ("site.vec", "0.6")):
        (tmp_path / name).write_text(f"2 2\nword0 0.1 0.2\nword1 0.3 {second}\n")
    folder, run_config = site(tmp_path, "toxic", vectors=str(tmp_path / "server.vec"))
    settings = ParticipantSettings.from_config(run_config)
    task = registry.server_task(settings)
    arrays = to_record(registry.server_trainer(settings, task).get_weights())
    grid = InProcessGrid(app, 2, run_config=run_config)
    for node, vectors in ((1, "server.vec"), (2, "site.vec")):
        grid.contexts[node].node_config = {
            "data-dir": str(folder), "vectors": str(tmp_path / vectors)
        }  # fmt: skip
    plan = {**LocalPlan(1, 1, 0.01).to_config(), "task-agreement": task.agreement}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(plan)})
    same, other = grid.send_and_receive([Message(content, node, "train") for node in (1, 2)])
    assert same.has_content()
    assert other.has_error()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 32, 32, 3), np.uint8)}, "expected arrays x and y"),
        ({"x": np.zeros((2, 32, 32), np.uint8), "y": np.zeros(2, int)}, r"x \[N, 32, 32, 3\]"),
        ({"x": np.zeros((2, 32, 32, 3), np.uint8), "y": np.zeros(3, int)}, r"and y \[N\]"),
        ({"x": np.zeros((2, 32, 32, 3), np.float32), "y": np.zeros(2, int)}, "x of uint8"),
        ({"x": np.zeros((2, 32, 32, 3), np.uint8), "y": np.array([0, 10])}, "from 0 to 9"),
        ({"x": np.zeros((2, 32, 32, 3), np.uint8), "y": np.zeros(2)}, "whole numbers"),
        ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "expected arrays x and y, found"),
    ],
)
def test_a_malformed_file_of_images_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(ColearnError, match=message):
        build(context_of(tmp_path, {"task": "cifar10"}))


def test_digits_are_scaled_as_scikit_learns(tmp_path):
    whole = digits.load().train_set
    for x in (whole.inputs * 16, (whole.inputs * 16).astype(int), whole.inputs):
        np.savez(tmp_path / "train.npz", x=x, y=whole.labels)
        read = digits.read(ParticipantSettings(), tmp_path, "train")
        np.testing.assert_array_equal(read.inputs, whole.inputs)
    np.savez(tmp_path / "train.npz", x=whole.inputs * 255, y=whole.labels)
    with pytest.raises(ColearnError, match="pixels from 0 to 16"):
        digits.read(ParticipantSettings(), tmp_path, "train")


def test_another_number_of_tags_is_refused(tmp_path):
    folder, run_config = site(tmp_path, "audioset", classes="a,b")
    with pytest.raises(ColearnError, match=r"expected 2 columns of y.*found 3"):
        build(context_of(folder, run_config))


# The node config


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({}, r"expected 'data-dir', the folder of this site's own data.*no keys"),
        ({"name": "utrecht"}, "found neither among name"),
        ({"num-partitions": 5, "data-dir": "/srv"}, "'partition-id' and 'num-partitions' together"),
        ({"partition-id": 0}, "'partition-id' and 'num-partitions' together"),
        ({"data-dir": "/nowhere/at/all"}, "found no folder '/nowhere/at/all'"),
    ],
)
def test_missing_keys_are_named(node_config, message):
    with pytest.raises(ColearnError, match=message):
        build(Context(1, 1, node_config, RecordDict(), {}))


def test_sites_shuffle_by_their_names(tmp_path):
    from clients.local_training import site_seed

    names = [{"name": "utrecht"}, {"name": "delft"}, {"partition-id": 3}]
    seeds = [site_seed(0, Context(1, 9, config, RecordDict(), {})) for config in names]
    assert len(set(seeds)) == 3
    # The name of a site, and not the id of its node, which changes when its key is renewed.
    assert site_seed(0, Context(1, 8, names[0], RecordDict(), {})) == seeds[0]
    assert site_seed(1, Context(1, 9, names[0], RecordDict(), {})) != seeds[0]


# A data set of the user's


class Squares:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0]), index % 2


def test_a_data_set_of_pytorchs_kind_is_held_out_by_index(tmp_path, flower_log):
    task = with_held_out(Task(Squares()), ParticipantSettings(held_out=0.3), tmp_path)
    assert isinstance(task.test_set, Subset)
    indices = [
        int(part[i][0][0]) for part in (task.train_set, task.test_set) for i in range(len(part))
    ]
    assert sorted(indices) == list(range(10))
    assert "7 training examples in" in flower_log.text


def test_no_examples_is_a_data_set():
    assert len(NO_EXAMPLES) == 0
    assert len(Task().train_set) == 0
    assert speech.definition(ParticipantSettings(classes="a,b")).model_options["num_classes"] == 2
    assert isinstance(Task().test_set, Examples)
