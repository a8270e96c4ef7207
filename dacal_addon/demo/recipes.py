"""How long a data set is trained on, and with which settings: the same for every method."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """The budget and the settings that all methods share."""

    source_iterations: int = 300
    iterations: int = 600
    batch: int = 4
    crop: int = 64
    """Width of the crops to train on, of the images' full height."""
    learning_rate: float = 2e-3
    """At the start; while self-training it falls to 0 linearly, as DAFormer's does."""
    weight_decay: float = 1e-2
    teacher_momentum: float = 0.99
    threshold: float = 0.9
    meta_warmup: int = 50
    target_statistics: bool = False
    """Whether BatchNorm's statistics are taken from target images when self-training is over; not for the source alone."""
    width: int = 1
    """Of the network, see `SmallUNet`."""

    def scaled(self, iterations: int) -> "Recipe":
        """With another number of iterations; the phases keep their proportions, so that a short run still warms up."""
        share = iterations / self.iterations
        return self._replace(
            iterations=iterations,
            source_iterations=max(1, round(share * self.source_iterations)),
            meta_warmup=round(share * self.meta_warmup),
        )


RECIPES = {
    "streets": Recipe(source_iterations=1000, crop=128, teacher_momentum=0.97),
    # Handwriting takes a network longer to learn: at 300 iterations it still sees background everywhere.
    "digits": Recipe(source_iterations=2500, target_statistics=True),
    "mitochondria": Recipe(),
}
