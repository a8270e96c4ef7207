"""`benchmarks/prepare_real_pictures.py` on made-up folders of each download's layout.

A picture's shade says which drive, section or eye it is of, its label is a pattern that shrinks to a known one.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torch.func", reason="the benchmarks need torch >= 2.0")
Image = pytest.importorskip("PIL.Image")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FOLDERS = ("idd-lite", "camvid", "vnc", "cdeep3m", "drive", "hrf")
SPLITS = ("source_train", "source_test", "target_train", "target_test")
SEQUENCES = ("0001TP", "0006R0", "0016E5", "Seq05VD")
STATES = ("dr", "g", "h")


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def save(array, path, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)


def shade(number, height, width, *channels):
    """4 apart, so that JPEG leaves the number readable."""
    return np.full((height, width, *channels), 4 * number, np.uint8)


def numbers(images):
    """Of the drives, sections or eyes that they show."""
    return (images.float().mean((1, 2, 3)) * 255 / 4).round().int()


def make_idd_lite(root):
    for part, drives, frames in (("train", range(10), 40), ("val", range(20, 30), 12)):
        for drive in drives:
            for frame in range(frames):
                label = np.repeat([0, 1, 2, 3, 4, 5, 6, 255], 4)[None].repeat(24, 0)
                save(shade(drive, 24, 32, 3), root / f"leftImg8bit/{part}/{drive}/{frame:06d}_image.jpg")
                save(label, root / f"gtFine/{part}/{drive}/{frame:06d}_label.png")
                save(label * 0 + 7, root / f"gtFine/{part}/{drive}/{frame:06d}_inst_label.png")


def make_camvid(root):
    """The four sequences spread over the three folders, like SegNet's."""
    label = np.repeat(np.arange(12), 4)[None].repeat(36, 0)
    for sequence, frames in enumerate((130, 100, 100, 120)):
        for frame in range(frames):
            part, name = ("train", "val", "test")[frame % 3], f"{SEQUENCES[sequence]}_{frame:05d}.png"
            save(shade(sequence, 36, 48, 3), root / part / name)
            save(label, root / f"{part}annot" / name)


def mitochondria():
    """A quarter of the section; a grey edge at its right, too dark to count."""
    label = np.zeros((1024, 1024), np.uint8)
    label[:, :256], label[:, 256:258] = 255, 100
    return label


def make_vnc(root):
    for number in range(20):
        one_bit = number in (1, 18)  # as in the download
        save(shade(number, 1024, 1024), root / f"stack1/raw/{number:02d}.tif")
        label = (mitochondria() > 127) * 255 if one_bit else mitochondria()
        save(label, root / f"stack1/mitochondria/{number:02d}.png", "1" if one_bit else None)


def make_cdeep3m(root):
    for part, sections in (("training", range(10, 30)), ("validation", range(50, 60))):
        for number in sections:
            save(shade(number, 1024, 1024), root / f"mito_testsample/{part}/images/images.{number:03d}.png")
            index = Image.fromarray((mitochondria() > 127).astype(np.uint8), "L")
            index.putpalette([9, 9, 9, 0, 0, 0])  # the index is the class, not the colour
            path = root / f"mito_testsample/{part}/labels/mitos_3D.{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            index.save(path)


def make_drive(root):
    """Every second column is a vessel; the topmost tiles and twelve columns at the left are out of view."""
    columns = np.arange(565) % 2 * 255
    view = np.full((584, 565), 255)
    view[:124], view[:, :14] = 0, 0
    for part, name, eyes in (("training", "training", range(21, 41)), ("test", "test", range(1, 21))):
        for eye in eyes:
            save(shade(eye, 584, 565, 3), root / part / f"images/{eye:02d}_{name}.tif")
            save(columns[None].repeat(584, 0), root / part / f"1st_manual/{eye:02d}_manual1.gif")
            save(view, root / part / f"mask/{eye:02d}_{name}_mask.gif")


def make_hrf(root):
    """3 x 4 tiles after shrinking, of which the first is out of view; stripes as broad as the shrinking."""
    columns = np.arange(1792) // 4 % 2 * 255
    view = np.full((1344, 1792, 3), 255)
    view[:448, :448], view[:, :40] = 0, 0
    for i, state in enumerate(STATES):
        for number in range(1, 16):
            name = f"{number:02d}_{state}"
            suffix = "JPG" if state == "dr" else "jpg"
            save(shade(15 * i + number, 1344, 1792, 3), root / f"images/{name}.{suffix}")
            save(columns[None].repeat(1344, 0), root / f"manual1/{name}.tif", compression="tiff_lzw")
            save(view, root / f"mask/{name}_mask.tif", compression="tiff_lzw")


MAKE = dict(zip(FOLDERS, (make_idd_lite, make_camvid, make_vnc, make_cdeep3m, make_drive, make_hrf)))


def prepare(monkeypatch, out, **folders):
    import prepare_real_pictures

    arguments = [word for name, folder in folders.items() for word in (f"--{name.replace('_', '-')}", str(folder))]
    monkeypatch.setattr(sys, "argv", ["prepare_real_pictures.py", "--out", str(out), *arguments])
    prepare_real_pictures.main()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("downloads")
    for name, make in MAKE.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def datasets(root, tmp_path_factory):
    import real_pictures

    out = tmp_path_factory.mktemp("arrays")
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(monkeypatch, out, **{name.replace("-", "_"): root / name for name in FOLDERS})
    assert real_pictures.names(out) == ["em_fly_mouse", "retina_drive_hrf", "streets_india_cambridge"]
    return {name.split("_")[0]: real_pictures.load(out / f"{name}.npz") for name in real_pictures.names(out)}


@pytest.mark.parametrize(
    ("name", "counts", "size", "classes"),
    [
        ("streets", (380, 102, 300, 114), (96, 128), 7),
        ("em", (350, 80, 320, 160), (128, 128), 2),
        ("retina", (320, 120, 330, 120), (112, 112), 2),
    ],
)
def test_splits_have_the_sizes_of_the_arrays_behind_the_figures(datasets, name, counts, size, classes):
    dataset = datasets[name]
    assert len(dataset.class_names) == classes
    assert dataset.palette.shape == (classes, 3)
    for split, count in zip(SPLITS, counts):
        image, label = getattr(dataset, split)
        assert image.shape == (count, 3, *size)
        assert label.shape == (count, *size)
        assert set(label.unique().tolist()) - {255} == set(range(classes))


def test_no_drive_sequence_section_or_eye_is_in_two_splits(datasets):
    shown = {(name, split): numbers(getattr(datasets[name], split).image).tolist() for name in datasets for split in SPLITS}
    assert set(shown["streets", "source_train"]) == set(range(10))
    assert set(shown["streets", "source_test"]) == set(range(20, 30))
    assert set(shown["streets", "target_train"]) == {0, 1, 2}
    assert set(shown["streets", "target_test"]) == {3}
    assert shown["em", "source_train"] == [number for number in range(14) for _ in range(25)]
    assert shown["em", "source_test"] == [number for number in range(15, 20) for _ in range(16)]
    assert shown["em", "target_train"] == [number for number in range(10, 30) for _ in range(16)]
    assert shown["em", "target_test"] == [number for number in range(50, 60) for _ in range(16)]
    assert shown["retina", "source_train"] == [eye for eye in range(21, 41) for _ in range(16)]
    assert shown["retina", "source_test"] == [eye for eye in range(1, 11) for _ in range(12)]
    eyes = [15 * state + number for state in range(3) for number in range(1, 11)]
    assert shown["retina", "target_train"] == [eye for eye in eyes for _ in range(11)]
    eyes = [11, 12, 13, 14, 15, 26, 27, 28, 29, 30, 44, 45]  # of the healthy ones only 14 and 15
    assert shown["retina", "target_test"] == [eye for eye in eyes for _ in range(10)]


def test_classes_of_streets(datasets):
    idd = torch.tensor([0, 1, 2, 3, 4, 5, 6, 255]).repeat_interleave(16)
    for split in (datasets["streets"].source_train, datasets["streets"].source_test):
        assert (split.label == idd).all()
    # sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist, nothing
    names = "sky building/vegetation roadside road sidewalk building/vegetation roadside roadside vehicle person person"
    starts = [next(i for i, name in enumerate(datasets["streets"].class_names) if name.startswith(n)) for n in names.split()]
    middles = [int((i + 0.5) * 128 / 12) for i in range(12)]
    for split in (datasets["streets"].target_train, datasets["streets"].target_test):
        assert (split.label[:, :, middles] == torch.tensor([*starts, 255])).all()


def test_mitochondria_of_one_bit_shades_and_indices(datasets):
    whole = torch.zeros(512, 512, dtype=torch.int64)
    whole[:, :128] = 1
    plain = [whole[y : y + 128, x : x + 128] for y in range(0, 512, 128) for x in range(0, 512, 128)]
    shifted = [whole[y : y + 128, x : x + 128] for y in (64, 192, 320) for x in (64, 192, 320)]
    em = datasets["em"]
    assert (em.source_train.label == torch.stack([*plain, *shifted] * 14)).all()
    for split, sections in ((em.source_test, 5), (em.target_train, 20), (em.target_test, 10)):
        assert (split.label == torch.stack(plain * sections)).all()


def test_vessels_and_what_is_out_of_view(datasets):
    retina = datasets["retina"]
    train, test = (retina.source_train, retina.target_train), (retina.source_test, retina.target_test)
    for split, hidden in [*zip(train, (12, 10)), *zip(test, (12, 10))]:
        ignored = split.label == 255
        assert set(ignored.sum((1, 2)).tolist()) == {0, 112 * hidden}
        columns = torch.arange(112) % 2  # DRIVE's tiles begin at an even column; HRF's stripes are one pixel broad now
        assert ((split.label == columns) | ignored).all()


def test_the_middle_of_a_broad_frame(tmp_path):
    import prepare_real_pictures

    frame = np.zeros((227, 320, 3), np.uint8)
    frame[:, 8:311] = 200  # 4:3 of IDD-Lite
    save(frame, tmp_path / "frame.png")
    image, _ = prepare_real_pictures.street(tmp_path / "frame.png", np.zeros((227, 320), np.uint8))
    assert (image == 200).all()


def test_shrink_is_the_mean_and_the_majority():
    import prepare_real_pictures

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 20), dtype=np.uint8)
    label = rng.choice(np.array([0, 1, 2, 255], np.uint8), (12, 20))
    small, majority = prepare_real_pictures.shrink(image, label, (10, 6), 3)
    blocks = image.reshape(6, 2, 10, 2).transpose(0, 2, 1, 3).reshape(6, 10, 4).astype(float)
    assert np.abs(small[..., 0] - blocks.mean(-1)).max() <= 1  # Pillow rounds twice
    for y in range(6):
        for x in range(10):
            votes = label[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel().tolist()
            assert majority[y, x] == max((0, 1, 2, 255), key=votes.count)  # of equal ones the first


def test_a_pair_with_one_folder_is_skipped(root, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, tmp_path / "out", drive=root / "drive")
    assert "retina_drive_hrf: skipped; it needs --drive and --hrf\n" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("idd-lite", lambda d: shutil.rmtree(d / "gtFine"), "a whole picture at .*000000_label.png, got .*No such file"),
        ("idd-lite", lambda d: shutil.rmtree(d / "leftImg8bit/train/3"), "at least 380 pictures.*, got 360"),
        ("idd-lite", lambda d: cut(d / "leftImg8bit/train/0/000000_image.jpg"), "a whole picture at .*, got .*[Tt]runcated"),
        ("idd-lite", lambda d: (d / "leftImg8bit/val/20").rename(d / "leftImg8bit/val/5"), "no drive in both .*, got 5"),
        ("camvid", lambda d: shutil.rmtree(d / "val"), "files .*png in .*val, got no such folder"),
        ("camvid", lambda d: save(np.zeros((9, 9)), d / "trainannot/0001TP_00000.png"), r"height and width, got .*\(9, 9\)"),
        ("vnc", lambda d: (d / "stack1/mitochondria/07.png").unlink(), "the same 20 sections"),
        ("vnc", lambda d: shutil.rmtree(d / "stack1/raw"), "in .*raw, got no such folder"),
        ("cdeep3m", lambda d: shutil.rmtree(d / "mito_testsample/validation"), "in .*validation.images, got no such folder"),
        ("drive", lambda d: shutil.rmtree(d / "test/1st_manual"), "files 1st_manual/01_manual1.gif in .*test, got none"),
        ("drive", lambda d: save(np.zeros((584, 565)), d / "training/mask/21_training_mask.gif"), "tiles in the view, .*got 0"),
        ("hrf", lambda d: (d / "images/03_g.jpg").unlink(), "files images/03_g.* in .*hrf, got none"),
    ],
)
def test_what_is_missing_or_broken_is_named(root, tmp_path, name, spoil, message):
    import prepare_real_pictures

    shutil.copytree(root / name, tmp_path / name)
    spoil(tmp_path / name)
    with pytest.raises(SystemExit, match=f"^prepare_real_pictures: expected .*{message}.*; [a-z]"):
        list(getattr(prepare_real_pictures, name.replace("-", "_"))(tmp_path / name))


def test_a_folder_that_is_none(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"prepare_real_pictures: expected a folder after --idd-lite, got .*; unpack"):
        prepare(monkeypatch, tmp_path / "out", idd_lite=tmp_path / "elsewhere", camvid=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_data_stay_outside_of_the_repository(monkeypatch):
    inside = BENCHMARKS / "results" / "pictures"
    with pytest.raises(SystemExit, match=r"prepare_real_pictures: expected --out outside of .*; name another folder"):
        prepare(monkeypatch, inside)
    assert not inside.exists()
