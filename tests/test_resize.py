"""Scores at another resolution, of classes that may be masked out."""

import math

import pytest
import torch
import torch.nn.functional as F

from dacal_addon._resize import resized_scores
from dacal_addon.learners.networks import at_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7,), (7, 9), (3, 7, 9)])
def test_a_masked_class_has_no_probability_and_the_others_have_their_own(size, dtype):
    small = [-(-extent // 2) for extent in size]
    z = torch.randn(2, 4, *small, generator=torch.Generator().manual_seed(0)).to(dtype)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    expected = F.interpolate(z[:, :3].double(), size=size, mode=mode, align_corners=False).softmax(1)
    z[:, 3] = -math.inf
    got = resized_scores("f", z, size)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.double().softmax(1), torch.cat([expected, 0 * expected[:, :1]], 1), atol=1e-6)
    assert torch.equal(at_size("f", "logits", z, size), got)


def test_scores_of_the_size_stay_what_they_are():
    z = torch.tensor([[-math.inf, 1.0]]).half().view(1, 2, 1)
    assert resized_scores("f", z, (1,)) is z
