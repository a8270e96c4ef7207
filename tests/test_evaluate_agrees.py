"""`dacal evaluate` counts what `CalibrationStats` counts of the same arrays, and speaks of options and not of arguments."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import predictions
from PIL import Image

import dacal_addon
from dacal_addon.evaluate import wording
from dacal_addon.evaluate.files import BadFile
from dacal_addon.evaluate.judging import judge_all
from dacal_addon.evaluate.options import EvaluateOptions
from dacal_addon.evaluate.plan import make_plan
from dacal_addon.metrics import CalibrationStats, boundary_mask

C, H, W = 4, 12, 16
SAFE_PT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
OF_CALLERS = re.compile(r"\w+=True|\w+=False|input='")


def save(folder, scores, label):
    for part in ("p", "l"):
        (folder / part).mkdir(exist_ok=True)
    if scores.dtype == torch.bfloat16:
        torch.save(scores[0].clone(), folder / "p/a.pt")
    else:
        np.save(folder / "p/a.npy", scores[0].numpy())
    Image.fromarray(label[0].numpy().astype("uint8")).save(folder / "l/a.png")


def judged(folder, kind="logits", classes=C, **given):
    options = EvaluateOptions(folder / "p", folder / "l", classes, input=kind, jobs=1, trust=True, **given)
    return judge_all(make_plan(options), options)


def scores_and_labels(of=C):
    z, target = predictions(7, (1, of, H, W), dtype=torch.float32, ignored=0.1)
    return z, target


def masked(z):
    """A class masked out, in some pixels."""
    z = z.clone()
    z[:, 1, ::2] = -math.inf
    return z


def reduced(target):
    return torch.where(target == 255, target, target + 1).masked_fill(target == 1, 0)


LOW = (slice(None), slice(None), slice(None, None, 4), slice(None, None, 4))
# Command's options, `CalibrationStats`' and `update`'s; what is done to the scores, and to the labels.
CASES = {
    "plain": ({}, {}, {}, None, None),
    "a class that does not count": ({"ignore_index": (2, 255)}, {"ignore_index": (2, 255)}, {}, None, None),
    "from 1": ({"reduce_zero_label": True}, {"reduce_zero_label": True}, {}, None, reduced),
    "from 1, a class that does not count": (
        {"reduce_zero_label": True, "ignore_index": (2, 255)},
        {"reduce_zero_label": True, "ignore_index": (2, 255)},
        {},
        None,
        reduced,
    ),
    "from 1, 0 named too": (
        {"reduce_zero_label": True, "ignore_index": (0, 255, C)},
        {"reduce_zero_label": True, "ignore_index": (0, 255, C)},
        {},
        None,
        reduced,
    ),
    "channels last": ({"channels_last": True}, {"channels_last": True}, {}, lambda z: z.permute(0, 2, 3, 1), None),
    "upsampled": ({"upsample": "bilinear"}, {}, {"interpolate": True}, lambda z: z[LOW], None),
    "upsampled, masked out": ({"upsample": "bilinear"}, {}, {"interpolate": True}, lambda z: masked(z)[LOW], None),
    "upsampled, half": ({"upsample": "bilinear"}, {}, {"interpolate": True}, lambda z: masked(z)[LOW].half(), None),
    "normalized": (
        {"normalize": True, "kind": "probs"},
        {"input": "probs"},
        {"normalize": True},
        lambda z: 1.05 * z.softmax(1),
        None,
    ),
    "one channel": (
        {"one_channel": True, "classes": 2},
        {"one_channel": True, "num_classes": 2},
        {},
        lambda z: z[:, 1:],
        None,
    ),
    "one channel, probabilities, upsampled": (
        {"one_channel": True, "classes": 2, "kind": "probs", "upsample": "bilinear"},
        {"one_channel": True, "num_classes": 2, "input": "probs"},
        {"interpolate": True},
        lambda z: z[:, 1:].sigmoid()[LOW],
        None,
    ),
    "class-wise": ({"classwise": True, "n_bins": 7}, {"classwise": True, "n_bins": 7}, {}, None, None),
}
if SAFE_PT:
    CASES["upsampled, bfloat16"] = (
        {"upsample": "bilinear"},
        {},
        {"interpolate": True},
        lambda z: masked(z)[LOW].bfloat16(),
        None,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_command_counts_what_the_class_counts(tmp_path, name):
    command, settings, update, of_scores, of_labels = CASES[name]
    settings = {"num_classes": C, "input": "logits", "per_image": True, **settings}
    z, target = scores_and_labels(settings["num_classes"])
    x = of_scores(z) if of_scores else z
    label = of_labels(target) if of_labels else target
    save(tmp_path, x, label)
    stats = CalibrationStats(**settings)
    stats.update(x, label, **update)
    found = judged(tmp_path, boundary=1, **command)
    assert found.stats.compute() == pytest.approx(stats.compute(), abs=1e-9, nan_ok=True)
    assert torch.equal(found.stats.confusion(), stats.confusion())
    assert found.stats.ignored_classes == stats.ignored_classes
    assert (found.stats.pixels, found.stats.ignored_pixels) == (stats.pixels, stats.ignored_pixels)
    assert found.stats.remarks() == stats.remarks()
    near = CalibrationStats(**settings)
    void = (*stats.ignore_index, *([0] if settings.get("reduce_zero_label") else []))
    near.update(x, label, boundary_mask(label, 1, ignore_index=void), **update)
    assert (found.boundary.pixels, found.boundary.ece()) == pytest.approx((near.pixels, near.ece()), abs=1e-9)


def refused(folder, error=(BadFile, ValueError), **given):
    with pytest.raises(error) as found:
        judged(folder, **given)
    assert not OF_CALLERS.search(str(found.value)), found.value
    return str(found.value)


def test_a_stray_label_is_named_as_it_is_in_the_file(tmp_path):
    z, target = scores_and_labels()
    label = reduced(target)
    label[0, 0, 0] = 9
    save(tmp_path, z, label)
    assert "expected classes 1..4 or 0 or 255, got the value 9" in refused(tmp_path, reduce_zero_label=True)


def test_remedies_are_options_of_the_command(tmp_path):
    z, target = scores_and_labels()
    save(tmp_path, z, target)
    assert "pass --input logits if they are logits" in refused(tmp_path, kind="probs")
    save(tmp_path, 1.05 * z.softmax(1), target)
    assert "pass --normalize" in refused(tmp_path, kind="probs")
    save(tmp_path, z.sigmoid() / 4, target)
    said = refused(tmp_path, kind="probs")
    assert "8-bit scores want --normalize, logits --input logits" in said
    assert "with --num-classes 2, --one-channel" in said
    assert "--n-bins" in refused(tmp_path, n_bins=10**6)
    assert "pass --ignore-index 255 if class 254 is not to count" in refused(tmp_path, classes=255, reduce_zero_label=True)
    assert "a whole number --ignore-index" in refused(tmp_path, ignore_index=(1 << 60,))


def strings(path):
    """Every text of a module besides its docstrings; of f-strings, with 0 for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            yield node.value


def test_no_message_speaks_of_arguments():
    package = Path(dacal_addon.__file__).parent
    found = [text for path in (package / "evaluate").glob("*.py") for text in strings(path) if OF_CALLERS.search(text)]
    assert [text for text in found if ">>>" not in text] == []
    told = [text for name in ("faults", "settings") for text in strings(package / "metrics" / f"{name}.py")]
    assert sum(bool(OF_CALLERS.search(text)) for text in told) > 5
    assert [text for text in told if OF_CALLERS.search(wording.as_options(text))] == []
