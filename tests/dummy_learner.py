"""A learner of somebody else's: all that has to be written. It pulls every temperature towards 2, whatever the images say."""

import math

import torch

from dacal_addon.learners import Defaults, Learned, Learner


class TowardsTwo(Learner):
    defaults = Defaults(judged_set="source_pixels", learning_rate=0.1)

    def gradient(self, iteration):
        temperature = iteration.label().temperature
        loss = (temperature.log() - math.log(2)).pow(2).mean()
        return Learned(torch.autograd.grad(loss, self.meta_parameters), temperature, outer_loss_before=float(loss.detach()))
