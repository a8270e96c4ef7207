"""Networks with one sigmoid channel: the same network with two channels, as the rest of the package has them."""

import torch
from torch import Tensor

from ._check import check_choice, check_tensor, describe, problem


def two_channels(x: Tensor, *, input: str = "logits") -> Tensor:
    """One sigmoid channel as the two of a softmax: class 1 is what the channel speaks for, class 0 the rest.

    softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)], and softmax([0, z] / T) the same of z / T. So a learner takes such a
    network with `logits_of=two_channels`, and a soft label's channel 1 is the target of a binary cross-entropy.

    Args:
        x: (N, 1, *S) floating, any number of spatial dimensions S.
        input: "logits", before the sigmoid, or "probs", after it.

    Returns:
        (N, 2, *S), [0, x] or [1 - x, x]; carries gradient.

    Raises:
        ValueError, TypeError: another shape or kind. Several sigmoids, which may all be right at a pixel, are not one
        distribution: judge each of them by itself.

    Example:
        >>> z = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
        >>> bool(torch.allclose(two_channels(z).softmax(1), two_channels(z.sigmoid(), input="probs")))
        True
    """
    check_choice("two_channels", "input", input, ("logits", "probs"))
    expected = "x: a floating tensor (N, 1, *spatial)"
    x = check_tensor("two_channels", "x", x, expected="a floating tensor (N, 1, *spatial)", remedy="pass the channel")
    if x.dim() < 3 or not x.is_floating_point() or x.shape[1] != 1:
        remedy = "of several sigmoids (multi-label outputs) pass one channel at a time, x[:, c : c + 1]"
        raise problem("two_channels", expected=expected, got=describe(x), remedy=remedy)
    return torch.cat([torch.zeros_like(x) if input == "logits" else 1 - x, x], 1)
