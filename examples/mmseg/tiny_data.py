"""A GTA-, a Cityscapes-, a SYNTHIA- and an ACDC-shaped data set of a few small images, to try a trainer before the real ones.

    python tiny_data.py data          # writes data/gta, data/synthia, data/cityscapes, data/acdc

File names, folders and the lists for rare-class sampling are those that DAFormer, HRDA and MIC expect after their
`tools/convert_datasets`. The pictures are the street scenes of `dacal demo` (256 x 128), source and target in two looks.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from PIL import Image

from dacal_addon.demo import streets

# The train ids of Cityscapes for the classes of `streets`, in their order: road, sidewalk, building, fence, pole, traffic sign,
# vegetation, sky, person, car.
TRAIN_ID = np.array([0, 1, 2, 4, 5, 7, 8, 10, 11, 13], np.uint8)
SCALE = 2


def picture(rng: np.random.Generator, look: str) -> Tuple[Image.Image, Image.Image]:
    """An image and its label map of train ids."""
    scene = streets.draw_scene(rng)
    colours = streets.source_look(scene, rng) if look == "source" else streets.target_look(scene, rng)
    pixels, label = np.rint(255 * colours).astype(np.uint8).transpose(1, 2, 0), TRAIN_ID[streets.pixel_label(scene)]
    image, train_ids = (Image.fromarray(x.repeat(SCALE, axis=0).repeat(SCALE, axis=1)) for x in (pixels, label))
    return image, train_ids


def write(root: Path, names: List[Tuple[str, str]], look: str, rng: np.random.Generator) -> None:
    """Images and labels under these names, and the two lists for rare-class sampling."""
    stats: List[Dict[str, object]] = []
    with_class: Dict[str, List[List[object]]] = {}
    for image_name, label_name in names:
        image, label = picture(rng, look)
        for name, content in ((image_name, image), (label_name, label)):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            content.save(root / name)
        counts = {str(k): int(n) for k, n in zip(*np.unique(np.asarray(label), return_counts=True))}
        stats.append({"file": str(root / label_name), **counts})
        for k, n in counts.items():
            with_class.setdefault(k, []).append([str(root / label_name), n])
    (root / "sample_class_stats.json").write_text(json.dumps(stats))
    (root / "samples_with_class.json").write_text(json.dumps(with_class))


def write_all(root: Path, *, images: int = 8, seed: int = 0) -> None:
    """All four data sets, `images` each for training and two for validation."""
    rng = np.random.default_rng(seed)
    numbers = [f"{i:05d}" for i in range(1, images + 1)]
    write(root / "gta", [(f"images/{n}.png", f"labels/{n}_labelTrainIds.png") for n in numbers], "source", rng)
    synthia = [(f"RGB/{n}.png", f"GT/LABELS/{n}_labelTrainIds.png") for n in numbers]
    write(root / "synthia", synthia, "source", rng)

    def cityscapes(split: str, count: int) -> List[Tuple[str, str]]:
        stems = [f"tiny/tiny_{i:06d}_000019" for i in range(count)]
        folders = (f"leftImg8bit/{split}", f"gtFine/{split}")
        return [(f"{folders[0]}/{s}_leftImg8bit.png", f"{folders[1]}/{s}_gtFine_labelTrainIds.png") for s in stems]

    def acdc(split: str, count: int) -> List[Tuple[str, str]]:
        stems = [f"{split}/fog/GP010001_frame_{i:06d}" for i in range(count)]
        # ACDC's folders are <condition>/<split>; the hosts' converted ones <split>/<condition>.
        return [(f"rgb_anon/{s}_rgb_anon.png", f"gt/{s}_gt_labelTrainIds.png") for s in stems]

    # Cityscapes is the target of two of the pairs and the source of the third: its lists cover the training images only.
    for name, names in (("cityscapes", cityscapes), ("acdc", acdc)):
        write(root / name, names("val", 2), "target", rng)
        write(root / name, names("train", images), "target", rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    write_all(options.root, images=options.images)
    print(f"{options.root}: gta, synthia, cityscapes and acdc, {options.images} training images each")
