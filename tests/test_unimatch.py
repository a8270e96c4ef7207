"""UniMatch's example: its loop runs, and the lines that its page adds to UniMatch's scripts train what these train."""

import importlib.util
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from test_package import ROOT, python
from torch import nn

from dacal_addon.learners import LEARNERS

FOLDER = ROOT / "examples/unimatch"
FIGURES = r"target mIoU (\d+\.\d) %, ECE (\d+\.\d\d) %\n"
TINY = ("--dataset", "digits", "--images", "16", "--threshold", "0.1")
SCRIPTS = ("unimatch_v2.py", "unimatch.py")


def loop(*options):
    """mIoU and ECE as trained, T, the same after the fold, and everything that is printed."""
    output = python("examples/unimatch/loop.py", *TINY, *options)
    found = re.findall(rf"as trained  {FIGURES}folded T = (\d\.\d\d) into the last layer: .+\nafter fold  {FIGURES}", output)
    assert len(found) == 1, output
    return (*map(float, found[0]), output)


@pytest.mark.parametrize("learner", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS)])
def test_the_loop_prints_before_and_after(learner):
    miou, ece, t, folded_miou, folded_ece, output = loop("--iters", "12", *(("--learner", learner) if learner else ()))
    assert miou == folded_miou
    assert (t == 1) == (ece == folded_ece)
    assert ("nothing is known of networks of this kind" in output) == (learner is not None)
    told = {None: "hard labels: there are no", "fit": "", "bilevel": "warm-up: iteration 1 of 6"}[learner]
    assert re.search(rf"iteration 0: loss \d+\.\d+; {told}", output)
    if learner is not None:
        assert re.search(r"iteration 6: loss \d+\.\d+; temperatures \d\.\d\d on average", output)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="autocast on a CPU came with torch 1.10")
@pytest.mark.parametrize("learner", LEARNERS)
def test_the_loop_runs_on_two_ranks_of_one_image_in_bfloat16(learner):
    *_, output = loop("--iters", "12", "--learner", learner, "--ranks", "2", "--bf16")
    assert len(re.findall(r"iteration 6: loss \d+\.\d+; temperatures \d\.\d\d on average", output)) == 1


@pytest.fixture(scope="module")
def runner():
    """The script that runs a checkout, as a module."""
    specification = importlib.util.spec_from_file_location("unimatch_run_on_cpu", str(FOLDER / "run_on_cpu.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_lines_are_put_where_the_page_says(runner):
    page = """
```python
# a.py, after line 2
    x = 1
# b.py, after line 1
nothing = "of a.py"
# a.py, delete lines 4-5
# a.py, instead of lines 7
y = 2
z = 3
```
"""
    edits = runner.changes(page.replace('# b.py, after line 1\nnothing = "of a.py"\n', ""), "a.py")
    assert edits == [(3, 2, "    x = 1\n"), (4, 5, ""), (7, 7, "y = 2\nz = 3\n")]
    assert runner.changed("1\n2\n3\n4\n5\n6\n7\n8\n", edits) == "1\n2\n    x = 1\n3\n6\ny = 2\nz = 3\n8\n"
    assert runner.changes(page, "c.py") == []
    assert runner.changes("```python\n# a.py, delete line 3\n```", "a.py") == [(3, 3, "")]
    with pytest.raises(ValueError, match=r"nothing below 'a\.py, delete line 3', got 'x"):
        runner.changes("```python\n# a.py, delete line 3\nx\n```", "a.py")


def typed(runner, script):
    """The page's lines for a script, in the script's order."""
    return [text for _, _, text in runner.changes((FOLDER / "README.md").read_text(), script)]


@pytest.mark.parametrize(("script", "most"), [("unimatch_v2.py", 8), ("unimatch.py", 9)])
def test_few_lines_are_typed(runner, script, most):
    assert len("".join(typed(runner, script)).splitlines()) == most


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, image, comp_drop=False):
        x = self.body(image).tanh()
        return 9 * self.head(x * torch.tensor([2.0, 0.0, 1.0, 1.0, 2.0, 0.0]).view(1, 6, 1, 1) if comp_drop else x)


def scene():
    """What a script has at hand when it comes to the page's lines; views are CutMixed already."""
    g = torch.Generator().manual_seed(0)
    names = ("img_x", "img_u_w", "img_u_s1", "img_u_s2", "img_u_w_mix")
    found = {name: 3 * torch.randn(3, 3, 8, 8, generator=g) for name in names}  # labels of all classes
    found["mask_x"] = torch.randint(0, 4, (3, 8, 8), generator=g)
    for name in ("ignore_mask", "ignore_mask_mix"):
        found[name] = torch.where(torch.rand(3, 8, 8, generator=g) < 0.3, torch.tensor(255), torch.tensor(0))
    for name in ("cutmix_box1", "cutmix_box2"):
        found[name] = (torch.rand(3, 8, 8, generator=g) < 0.4).float()
    student = Student()
    found.update(model=student, model_ema=Student().eval(), optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    with torch.no_grad():
        found["pred_u_w"], found["pred_u_w_mix"] = student(found["img_u_w"]), student(found["img_u_w_mix"])
    found["pred_u_w_fp"] = student(found["img_u_w"] + 0.1)
    found["cfg"] = {"nclass": 4, "conf_thresh": 0.6}
    found["torch"] = torch
    return found


def view_loss(z, teacher, other, padding, other_padding, box, label):
    """UniMatch's loss of a view into which `other` was pasted, in float64: sure pixels, over all that are no padding."""
    paste = box == 1
    confidence = torch.where(paste.unsqueeze(1), other, teacher).double().softmax(1).amax(1)
    taught = torch.where(paste.unsqueeze(1), label(other), label(teacher)).double()
    valid = torch.where(paste, other_padding, padding) != 255
    loss = -(taught * z.double().log_softmax(1)).sum(1)
    return float((loss[valid & (confidence >= 0.6)].sum() / valid.sum()).detach())


def hard(z):
    return F.one_hot(z.argmax(1), 4).permute(0, 3, 1, 2)


def losses(x, script, label):
    """Of the two views, and of UniMatch V1's perturbed features; `label` makes (N, C, H, W) of the teacher's logits."""
    drop = {"comp_drop": True} if script == "unimatch_v2.py" else {}
    teacher, padding = x["pred_u_w"], x["ignore_mask"]
    other, other_padding = (teacher.flip(0), padding.flip(0)) if drop else (x["pred_u_w_mix"], x["ignore_mask_mix"])
    views = [
        view_loss(x["model"](x[view], **drop), teacher, other, padding, other_padding, x[box], label)
        for view, box in (("img_u_s1", "cutmix_box1"), ("img_u_s2", "cutmix_box2"))
    ]
    return (*views, view_loss(x["pred_u_w_fp"], teacher, teacher, padding, padding, x["cutmix_box1"], label))


def check_losses(found, script, expected):
    first, second, perturbed = expected
    assert first != pytest.approx(second, rel=0.01)
    if script == "unimatch_v2.py":
        assert found["loss_u_s"].item() == pytest.approx((first + second) / 2, rel=1e-5)
    else:
        assert (found["loss_u_s1"] + found["loss_u_s2"]).item() == pytest.approx(first + second, rel=1e-5)
        assert found["loss_u_w_fp"].item() == pytest.approx(perturbed, rel=1e-5)


def executed(runner, script, learner):
    """The scene after the page's lines, but for those of checkpoints."""
    found = scene()
    if learner:
        found["cfg"]["dacal"] = {"learner": learner, "warmup": 0}
    for text in typed(runner, script):
        if "state_dict" not in text:
            exec(textwrap.dedent(text), found)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pages_lines_have_unimatchs_loss_with_hard_labels(runner, script):
    found = executed(runner, script, None)
    check_losses(found, script, losses(found, script, hard))
    assert set(found["dacal"].state_dict()) == {"learner", "generator"}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pages_lines_learn_temperatures(runner, script, learner):
    found = executed(runner, script, learner)
    dacal, x = found["dacal"], found
    assert dacal.learner.iteration == 1
    assert float(dacal.learner.temperature_net.last.weight.detach().abs().max()) > 0
    (x["loss_u_s"] if "loss_u_s" in x else x["loss_u_s1"] + x["loss_u_w_fp"]).backward()
    assert all(parameter.grad is not None for parameter in x["model"].parameters())
    assert all(parameter.grad is None for parameter in dacal.learner.temperature_net.parameters())

    def soft(z):
        with torch.no_grad():
            return (z / dacal.learner.temperature_net(z)).softmax(1)

    expected = losses(x, script, soft)
    check_losses(x, script, expected)
    assert expected != pytest.approx(losses(x, script, lambda z: z.softmax(1)), rel=1e-6)  # they have learned
