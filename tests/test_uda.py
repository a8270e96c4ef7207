"""`benchmarks/uda.py` at a size that takes a minute, and the calibrations it compares against, on cases with a known answer."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("torch.func", reason="the benchmarks need torch >= 2.0")
ABLATION = [
    "bilevel-cut-mix",
    "bilevel-3-steps",
    "bilevel-prior",
    "first-disagreement",
    "first-weight-calibrated",
    "fit-restyled",
]


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def uda(*arguments, check=True):
    command = [sys.executable, str(BENCHMARKS / "uda.py"), "--quick", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uda")
    uda("--out", folder, "--cache", folder / "cache")
    uda("--out", folder, "--cache", folder / "cache", "--ablation", "--methods", *ABLATION)
    return folder


def test_quick_runs_every_method_on_every_data_set(quick):
    from post_hoc import CALIBRATIONS
    from uda_methods import METHODS

    rows = json.loads((quick / "uda.json").read_text())
    post_hoc = [f"{base}+{name}" for base, method in METHODS.items() if method.post_hoc for name in CALIBRATIONS]
    expected = {
        (dataset, method, model)
        for dataset in ("streets", "digits", "mitochondria")
        for method in [*METHODS, *post_hoc]
        for model in ("student", "teacher")
        if model == "student" or method in METHODS
    }
    expected |= {("streets", method, model) for method in ABLATION for model in ("student", "teacher")}
    assert {(row["dataset"], row["method"], row["model"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert all(0 <= row[figure] <= 1 for figure in ("miou", "accuracy", "confidence", "ece", "confidence_auroc"))
        # Binned confidence and accuracy give the row's own figures back.
        pixels, confidence, accuracy = np.array(row["bins"]).T
        assert abs(np.average(accuracy - confidence, weights=pixels)) == pytest.approx(
            abs(row["accuracy"] - row["confidence"]), abs=2e-4
        )
        assert np.average(np.abs(accuracy - confidence), weights=pixels) == pytest.approx(row["ece"], abs=2e-4)
        base, _, calibration = row["method"].partition("+")
        known = bool(calibration) or base.startswith(("dacal", "bilevel", "fi", "bound-f"))
        of_temperatures = ("temperature_mean", "temperature_auroc", "label_auroc", "label_ece")
        assert all((row[name] is not None) == known for name in of_temperatures)
        if calibration:  # of the student itself, whose logits were divided
            assert row["label_auroc"] == row["confidence_auroc"]
            assert row["label_ece"] == row["ece"]
            assert calibration == "lts" or row["temperature_auroc"] == 0.5
    page = (quick / "uda.md").read_text()
    judged = [row for row in rows if "blends_accuracy" in row]
    assert {(row["dataset"], row["method"], row["model"]) for row in judged} == {
        (dataset, base, "student")
        for dataset in ("streets", "digits", "mitochondria")
        for base, method in METHODS.items()
        if method.post_hoc
    }
    assert "## Do blends stand for the target?" in page
    assert all(f"## {dataset}, student" in page for dataset in ("streets", "digits", "mitochondria"))
    assert "### Fitted directly, second round" in page
    assert {path.name for path in quick.glob("*.png")} == {
        "uda_frontier.png",
        "uda_ablation.png",
        *(f"uda_reliability_{dataset}.png" for dataset in ("streets", "digits", "mitochondria")),
    }


def test_a_temperature_leaves_the_prediction_alone(quick):
    rows = json.loads((quick / "uda.json").read_text())
    own = {(row["dataset"], row["method"]): row["miou"] for row in rows if row["model"] == "student"}
    calibrated = [key for key in own if "+" in key[1]]
    assert len(calibrated) == 30
    for dataset, method in calibrated:
        assert own[dataset, method] == own[dataset, method.split("+")[0]]


def test_an_interrupted_table_continues_where_it_was(quick, tmp_path):
    (tmp_path / "uda_settings.json").write_text((quick / "uda_settings.json").read_text())
    rows = json.loads((quick / "uda.json").read_text())
    kept = [row for row in rows if (row["dataset"], row["method"]) != ("digits", "soft")]
    (tmp_path / "uda.json").write_text(json.dumps(kept))
    printed = uda("--out", tmp_path, "--cache", quick / "cache").stdout
    assert "1 of 1," in printed
    again = json.loads((tmp_path / "uda.json").read_text())

    def figures(rows):
        return sorted(json.dumps({**row, "seconds": 0}) for row in rows)

    assert figures(again) == figures(rows)


def test_a_part_of_the_table_has_a_report_too(quick, tmp_path):
    """Without hard pseudo-labels, of which there are no differences then, and with those of another seed alone."""
    from uda_ablation import ABLATION
    from uda_methods import METHODS
    from uda_report import write_report

    rows = [row for row in json.loads((quick / "uda.json").read_text()) if row["method"] in ("mbls", "hard", "fit-restyled")]
    without = [row for row in rows if row["method"] != "hard"]
    apart = [*without, *({**row, "seed": 7} for row in rows if row["method"] == "hard")]
    for part in (without, apart):
        assert (tmp_path / "uda.md") in write_report(part, tmp_path, METHODS, ABLATION)
        line = next(line for line in (tmp_path / "uda.md").read_text().splitlines() if line.startswith("| margin-based"))
        assert line == "| margin-based smoothing | 1 |  |  |  |"


def test_runs_of_other_settings_are_not_mixed_in(quick):
    refused = uda("--out", quick, "--iterations", "9", check=False)
    assert refused.returncode == 1
    assert "choose another --out" in refused.stderr


@pytest.fixture(scope="module")
def small():
    """Few images, and what trains a method on them for three iterations with the target's labels as they are or others."""
    from dacal_addon.demo.datasets import load_dataset
    from dacal_addon.demo.recipes import RECIPES
    from dacal_addon.demo.training import train, train_start

    dataset = load_dataset("mitochondria", seed=0, train_images=8, test_images=2)
    recipe = RECIPES["mitochondria"]._replace(source_iterations=5, iterations=3, batch=2, crop=32, meta_warmup=0, threshold=0.0)
    start = train_start(dataset, recipe, seed=0, device=torch.device("cpu"))
    other = dataset._replace(target_train=dataset.target_train._replace(label=1 - dataset.target_train.label))

    def trained(make, *, mislabelled=False):
        own = other if mislabelled else dataset
        return train(make, start, own, recipe, seed=0, device=torch.device("cpu")).student.state_dict()

    return trained


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_bounds_alone_see_the_targets_labels(small):
    from uda_ablation import ABLATION
    from uda_methods import METHODS

    for name, method in {**METHODS, **ABLATION}.items():
        blind = same(small(method.make), small(method.make, mislabelled=True))
        assert blind == (not method.bound), name
        assert method.title.startswith("bound: ") == method.bound


def test_every_method_sees_the_same_batches_and_dropout_seeds(small):
    from uda_methods import METHODS

    def seen(make):
        noted = []

        def noting(student, optimizer, recipe):
            teaching = make(student, optimizer, recipe)
            source_loss = teaching.source_loss

            def first_of_an_iteration(batch):
                images = [value.clone() for value in batch if isinstance(value, torch.Tensor)]
                noted.append((images, torch.get_rng_state()))
                return source_loss(batch)

            teaching.source_loss = first_of_an_iteration
            return teaching

        small(noting)
        return noted

    expected = seen(METHODS["hard"].make)
    assert len(expected) == 3
    assert not torch.equal(expected[0][1], expected[1][1])
    for name, method in METHODS.items():
        for (images, state), (others, other_state) in zip(seen(method.make), expected):
            assert all(torch.equal(one, other) for one, other in zip(images, others)), name
            assert name == "source-only" or torch.equal(state, other_state), name  # which makes one pass fewer


def test_a_design_without_a_change_is_the_tables_method(small):
    from uda_ablation import FITTED, Design, Variant
    from uda_methods import METHODS

    trained = {name: small(METHODS[name].make) for name in ("dacal-bilevel", "dacal")}
    assert same(small(partial(Variant, design=Design())), trained["dacal-bilevel"])
    assert same(small(partial(Variant, design=FITTED)), trained["dacal"])
    assert not same(trained["dacal"], trained["dacal-bilevel"])


def test_no_calibration_but_the_bound_sees_the_targets_labels(material):
    import post_hoc

    def flipped(split):
        return split._replace(label=(split.label + 1) % 3)

    dataset = material.dataset
    other = dataset._replace(target_train=flipped(dataset.target_train), target_test=flipped(dataset.target_test))

    def found(calibration, dataset):
        own = material._replace(dataset=dataset, generator=torch.Generator().manual_seed(0))
        result = calibration(own)
        return result if isinstance(result, float) else result.last.weight.tolist()

    for name, (title, calibration) in post_hoc.CALIBRATIONS.items():
        blind = found(calibration, dataset) == found(calibration, other)
        assert blind == (not title.startswith("bound: ")), name


def test_auroc_is_scikit_learns():
    from uda import auroc

    g = torch.Generator().manual_seed(0)
    value, positive = torch.randint(0, 9, (500,), generator=g).float(), torch.rand(500, generator=g) < 0.3
    assert auroc(value, positive) == pytest.approx(roc_auc_score(positive, value), abs=1e-12)
    assert auroc(value, torch.zeros(500).bool()) == 0.5


class Overconfident(nn.Module):
    """A network whose logits are three times those from which the labels are drawn."""

    factor = 3.0

    def features(self, image):
        return image

    def logits(self, features):
        return self.factor * features

    def forward(self, image):
        return self.logits(self.features(image))


@pytest.fixture(scope="module")
def material():
    """Labels drawn from softmax(image): T = 3 is right everywhere, on source and target."""
    from post_hoc import Material

    from dacal_addon.demo.datasets import Dataset, Split

    def split(seed, n):
        g = torch.Generator().manual_seed(seed)
        image = 1.5 * torch.randn(n, 3, 24, 24, generator=g)
        label = torch.multinomial(F.softmax(image, 1).permute(0, 2, 3, 1).reshape(-1, 3), 1, generator=g).view(n, 24, 24)
        return Split(image, label)

    dataset = Dataset("drawn", ("a", "b", "c"), None, split(1, 60), split(2, 60), split(3, 60), split(4, 60))
    return Material(Overconfident(), dataset, torch.Generator().manual_seed(0), torch.device("cpu"))


@pytest.mark.parametrize("name", ["source_temperature", "oracle_temperature", "transcal"])
def test_where_nothing_shifts_every_calibration_finds_the_temperature(material, name):
    import post_hoc

    assert getattr(post_hoc, name)(material) == pytest.approx(3.0, rel=0.05)


def test_local_temperatures_come_near_it_too(material):
    import post_hoc

    net = post_hoc.local_temperature(material, steps=300)
    image = material.dataset.target_test.image
    found = post_hoc.temperatures(net, material.network(image), image, device=torch.device("cpu"))
    assert found.shape == (60, 1, 24, 24)
    assert float(found.mean()) == pytest.approx(3.0, rel=0.15)


def test_transcal_follows_an_error_that_grows_where_the_target_is():
    """The target has more of the pixels that go wrong: the source's T is too low, and TransCal's goes the right way."""
    import post_hoc

    from dacal_addon.demo.datasets import Dataset, Split

    class Certain(nn.Module):
        def features(self, image):
            return image

        def logits(self, features):
            return 4.0 * torch.cat([torch.ones_like(features), torch.zeros_like(features)], 1)

        def forward(self, image):
            return self.logits(self.features(image))

    def split(seed, share_hard):
        g = torch.Generator().manual_seed(seed)
        hard = torch.rand(40, 1, 16, 16, generator=g) < share_hard
        wrong = torch.rand(40, 16, 16, generator=g) < torch.where(hard[:, 0], 0.4, 0.02)
        return Split(hard.float() + 0.05 * torch.randn(hard.shape, generator=g), wrong.long())

    source, target = split(0, 0.1), split(1, 0.6)
    dataset = Dataset("shifted", ("a", "b"), None, source, target, split(2, 0.1), split(3, 0.6))
    material = post_hoc.Material(Certain(), dataset, torch.Generator().manual_seed(0), torch.device("cpu"))
    truth = float(target.label.float().mean())
    # Two classes with a logit difference of 4: sigmoid(4 / T) = accuracy.
    right = 4.0 / np.log((1 - truth) / truth)
    plain, found = post_hoc.source_temperature(material), post_hoc.transcal(material)
    assert plain < 0.6 * right
    # Not all the way: the power of the weights is found along with T, and starts at a half.
    assert 1.2 * plain < found < 1.05 * right


def test_pseudocal_judges_blends_by_the_dominant_label_where_labels_differ(material):
    import post_hoc

    # By hand: the same draws, the blends, and a grid over T.
    generator = torch.Generator().manual_seed(5)
    found = post_hoc.pseudocal(material._replace(generator=torch.Generator().manual_seed(5)))
    target = material.dataset.target_train.image
    image = target[torch.randperm(60, generator=generator)]
    shift = int(torch.randint(1, 60, (1,), generator=generator))
    label = image.argmax(1)
    blended = 0.65 * image + 0.35 * image.roll(shift, 0)
    judged = label != label.roll(shift, 0)
    z, y = (3 * blended).permute(0, 2, 3, 1)[judged].double(), label[judged]
    grid = np.linspace(0.2, 6, 300)
    losses = [float(F.cross_entropy(z / t, y)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.03)


def test_pasta_noises_high_frequencies_most_and_leaves_the_range():
    from uda_methods import pasta

    g = torch.Generator().manual_seed(0)
    image = 0.5 + 0.02 * torch.randn(8, 3, 32, 32, generator=g)
    changed = pasta(image, g)
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    before, after = (torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs() for x in (image, changed))
    ratio = (after - before).abs() / before.clamp(min=1e-3)
    assert float(ratio[..., 14:18, 14:18].median()) > 3 * float(ratio[..., 1:3, 1:3].median())


def test_one_hand_unrolled_virtual_step_is_the_engines():
    """But for the derivative of AdamW's second moment, which one gradient hardly moves after a long history."""
    from uda_ablation import Design, Variant

    from dacal_addon.demo.batches import Batch
    from dacal_addon.demo.network import SmallUNet
    from dacal_addon.demo.recipes import Recipe

    def grads(design):
        student, g = SmallUNet(4, seed=0).double(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        image = torch.rand(4, 2, 3, 32, 32, generator=g, dtype=torch.float64)
        label = torch.randint(0, 4, (2, 2, 32, 32), generator=g)
        mask = torch.rand(2, 1, 32, 32, generator=g) < 0.5
        batch = Batch(label[0], image[0], image[1], image[2], image[3], mask, label[1], g)
        student.dropout.p = 0.0  # whose masks they draw in another order
        F.cross_entropy(student(image[0]), label[0]).backward()
        optimizer.step()
        for state in optimizer.state.values():  # a long history of larger gradients
            state["step"] += 10_000
            state["exp_avg"] *= 10
            state["exp_avg_sq"].fill_(0.01)
        variant = Variant(student, optimizer, Recipe(meta_warmup=0, threshold=0.0), design=design)
        nn.init.constant_(variant.temperature_net.double().last.weight, 0.1)
        noted = []
        variant.meta_optimizer.step = lambda: noted.extend(p.grad.clone() for p in variant.temperature_net.parameters())
        teacher = SmallUNet(4, seed=1).double().eval()
        optimizer.zero_grad()
        variant.teach(teacher, batch)
        return torch.cat([grad.flatten() for grad in noted])

    engine = grads(Design(every=1))
    by_hand = grads(Design(every=1, prior=1e-30))
    cosine = float(F.cosine_similarity(engine, by_hand, dim=0))
    assert cosine > 0.9999
    assert float(by_hand.norm() / engine.norm()) == pytest.approx(1.0, abs=0.05)
