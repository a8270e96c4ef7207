"""The embedded benchmarks and the command, at a size that takes seconds."""

import json

import numpy as np
import pytest
import torch

from dacal_addon import cli
from dacal_addon.demo import datasets, methods, plots, run, training
from dacal_addon.demo.network import SmallUNet
from dacal_addon.demo.recipes import Recipe

SIZES = {"streets": (64, 128), "digits": (48, 64), "mitochondria": (64, 64)}


@pytest.fixture(scope="module", params=datasets.NAMES)
def dataset(request):
    return datasets.load_dataset(request.param, seed=3, train_images=12, test_images=6)


def splits(dataset):
    return [dataset.source_train, dataset.target_train, dataset.source_test, dataset.target_test]


def test_splits_have_the_announced_form(dataset):
    classes = len(dataset.class_names)
    assert dataset.palette.shape == (classes, 3)
    assert len({tuple(colour) for colour in dataset.palette}) == classes
    for split, n in zip(splits(dataset), (12, 12, 6, 6)):
        assert split.image.shape == (n, 3, *SIZES[dataset.name])
        assert split.label.shape == (n, *SIZES[dataset.name])
        assert (split.image.dtype, split.label.dtype) == (torch.float32, torch.int64)
        assert 0 <= split.image.min() < 0.3 < 0.7 < split.image.max() <= 1
        assert 0 <= split.label.min() <= split.label.max() < classes
    assert len(torch.cat([split.label.flatten() for split in splits(dataset)]).unique()) == classes


def test_the_same_seed_gives_the_same_pixels_and_another_one_others(dataset):
    again = datasets.load_dataset(dataset.name, seed=3, train_images=12, test_images=6)
    other = datasets.load_dataset(dataset.name, seed=4, train_images=12, test_images=6)
    for one, two, three in zip(splits(dataset), splits(again), splits(other)):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.label, two.label)
        assert not torch.equal(one.image, three.image)


def test_a_larger_split_begins_with_the_smaller_one(dataset):
    larger = datasets.load_dataset(dataset.name, seed=3, train_images=14, test_images=6)
    assert torch.equal(larger.source_train.image[:12], dataset.source_train.image)
    assert torch.equal(larger.target_test.image, dataset.target_test.image)


def test_no_two_images_are_the_same(dataset):
    images = torch.cat([split.label for split in splits(dataset)])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_the_target_looks_different():
    """Duller and rougher than the source, for streets; another background, for digits."""
    data = datasets.load_dataset("streets", seed=0, train_images=20, test_images=1)

    def saturation(split):
        return float((split.image.amax(1) - split.image.amin(1)).mean())

    assert saturation(data.target_train) < 0.8 * saturation(data.source_train)


def test_no_digit_is_in_both_splits():
    from dacal_addon.demo.digits import load_material

    train, test = load_material("train"), load_material("test")
    assert len(train.ink) + len(test.ink) == 1797
    shared = {ink.tobytes() for ink in train.ink} & {ink.tobytes() for ink in test.ink}
    assert not shared
    assert [a.shape[1] + b.shape[1] for a, b in zip(train.photographs, test.photographs)] == [640, 640]


def test_an_unknown_benchmark_is_named():
    with pytest.raises(ValueError, match="name to be one of 'streets', 'digits', 'mitochondria', got 'cityscapes'"):
        datasets.load_dataset("cityscapes", seed=0)


def tiny(**changes):
    recipe = Recipe(source_iterations=2, iterations=3, batch=2, crop=32, meta_warmup=1, threshold=0.1)
    return recipe._replace(**changes)


def test_all_methods_see_the_same_images_and_masks(dataset):
    """Streams of their own for images, augmentation and masks: what a method draws cannot shift what another one sees."""
    cpu = torch.device("cpu")
    start = training.train_start(dataset, tiny(), seed=0, device=cpu)
    seen = {}

    def spied(method):
        class Spied(methods.METHODS[method]):
            def teach(self, teacher, batch):
                seen[method].append((*batch[:-1], torch.rand(1)))  # and the dropout's seed
                return super().teach(teacher, batch)

        return Spied

    for method in methods.METHODS:
        seen[method] = []
        training.train(spied(method), start, dataset, tiny(), seed=0, device=cpu)
    assert len(seen["hard"]) == 3
    for method in ("source-only", "bilevel"):
        one, two = seen["hard"][0], seen[method][0]
        assert all(torch.equal(a, b) for a, b in zip(one, two))
        for one, two in zip(seen["hard"], seen[method]):
            assert all(torch.equal(a, b) for a, b in zip(one[:-1], two[:-1]))


def test_training_is_reproducible_moves_the_temperatures_and_leaves_the_start_alone(dataset):
    cpu = torch.device("cpu")
    random_state = torch.get_rng_state()
    start = training.train_start(dataset, tiny(), seed=0, device=cpu)
    before = {name: value.clone() for name, value in start.student.state_dict().items()}
    runs = [training.train(methods.BilevelTemperatures, start, dataset, tiny(), seed=0, device=cpu) for _ in range(2)]
    for a, b in zip(runs[0].student.parameters(), runs[1].student.parameters()):
        assert torch.equal(a, b)
    assert float(runs[0].teaching.temperature_net.last.weight.detach().abs().sum()) > 0
    assert all(torch.equal(value, before[name]) for name, value in start.student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_teacher_is_the_moving_average():
    teacher, student = SmallUNet(3, seed=0), SmallUNet(3, seed=1)
    student.stem[0][1].running_mean += 1
    a, b = teacher.head.weight.clone(), student.head.weight.clone()
    training.update_teacher(teacher, student, 0.75)
    np.testing.assert_allclose(teacher.head.weight.detach(), (0.75 * a + 0.25 * b).detach(), rtol=1e-6)
    assert torch.equal(teacher.stem[0][1].running_mean, student.stem[0][1].running_mean)


def test_the_images_with_most_classes_are_picked():
    label = torch.zeros(4, 2, 2, dtype=torch.int64)
    label[1, 0, 0], label[3] = 1, torch.tensor([[1, 2], [3, 4]])
    assert plots.pick_images(label, 2) == [1, 3]


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(
        run, "load_dataset", lambda name, seed: datasets.load_dataset(name, seed=seed, train_images=8, test_images=4)
    )


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_table_and_pictures(small_demo, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--dataset", "digits", "--seed", "1", "--iters", "20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["source-only", "hard", run.FOLDED, "bilevel"]
    hard, folded = report["rows"][1:3]
    assert (folded["miou"], folded["accuracy"]) == (hard["miou"], hard["accuracy"])
    said = f"from {100 * hard['ece']:.2f} to {100 * folded['ece']:.2f} %; no prediction changes."
    assert f"One temperature, {folded['temperature']:.2f}, found without target labels" in printed
    assert said in printed
    assert (report["dataset"], report["seed"], report["recipe"]["iterations"]) == ("digits", 1, 20)
    assert f"source-only has {100 * report['rows'][0]['source_miou']:.1f} mIoU" in printed
    for row in report["rows"]:
        assert all(0 <= row[name] <= 1 for name in ("miou", "accuracy", "confidence", "ece"))
        assert f"{100 * row['ece']:8.2f}{row['nll']:8.3f}" in printed
        assert run.TITLES[row["method"]] in printed
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"reliability.png", "confidence.png"}
    assert all((out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)


def test_ctrl_c_leaves_what_is_finished(small_demo, tmp_path, capsys, monkeypatch):
    train = training.train

    def interrupted(teaching, *arguments, **options):
        if teaching is methods.BilevelTemperatures:
            raise KeyboardInterrupt
        return train(teaching, *arguments, **options)

    monkeypatch.setattr(run, "train", interrupted)
    assert cli.main(["demo", "--iters", "2", "--out", str(tmp_path)]) == 130
    output = capsys.readouterr()
    assert "Not finished: DA-Cal, bilevel." in output.err
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["source-only", "hard", run.FOLDED]
    assert {path.name for path in tmp_path.glob("*.png")} == {"reliability.png", "confidence.png"}


def test_ctrl_c_at_once_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_dataset", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "nothing was finished" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["demo", "--iters", "0"], ["demo", "--seed", "-1"], ["demo", "--dataset", "gta"], [], ["train"]]
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: dacal" in capsys.readouterr().err


def test_a_missing_device_is_named_before_anything_is_trained(tmp_path, capsys):
    assert cli.main(["demo", "--device", "cuda:99", "--out", str(tmp_path / "x")]) == 1
    assert "no device 'cuda:99' here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'dacal-addon[demo]'" in capsys.readouterr().err


def test_statistics_are_the_means_over_the_targets_images_and_only_of_who_sees_them(dataset):
    cpu = torch.device("cpu")
    recipe = tiny(target_statistics=True)
    start = training.train_start(dataset, recipe, seed=0, device=cpu)
    hard, source_only = (
        training.train(methods.METHODS[name], start, dataset, recipe, seed=0, device=cpu) for name in ("hard", "source-only")
    )
    image = dataset.target_train.image
    for trained, expected in ((hard, True), (source_only, False)):
        for network in (trained.student, trained.teacher):
            convolution, norm = network.stem[0][0], network.stem[0][1]
            with torch.no_grad():
                # In batches of ten: 12 images are ten and two, and every batch counts alike.
                means = torch.stack([convolution(part - 0.5).mean((0, 2, 3)) for part in image.split(10)])
            assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-5) == expected
            assert norm.momentum == 0.1
    assert hard.student.training
    assert hard.student.dropout.training
    assert not hard.teacher.dropout.training
