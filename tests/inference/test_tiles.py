"""Detection in tiles: each object is detected once, where it is."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain, islice, pairwise, product, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.tiling import MIN_TILE, tile_windows
from retinanet.data.windows import Window, Windows
from retinanet.errors import ConfigError, ImageError
from retinanet.evaluation.run import evaluate
from retinanet.inference import Detector, Failure, ImageDetections
from retinanet.inference.sources import Source
from retinanet.inference.tiles import Part, choose_tiling, merge_parts, tile_side
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import Detections
from white_finder import black

# The detector's input is 64 x 64: in a tile of 64 its squares are 8 x 8 pixels of the image, on a
# grid that starts at the tile's corner. In an image of 512 x 512, seen whole, they are 64 x 64.
SIDE = 64


def whites(found: ImageDetections | list[ImageDetections] | Failure) -> list[list[float]]:
    """Sorted boxes of class 0; each has a box of class 1."""
    assert isinstance(found, ImageDetections)
    assert (found.scores.diff() <= 0).all()
    boxes = found.boxes[found.labels == 0].tolist()
    assert sorted(boxes) == sorted(found.boxes[found.labels == 1].tolist())
    return sorted(boxes)


def square(x: int, y: int, side: int = 8) -> tuple[int, int, int, int]:
    return (x, y, x + side, y + side)


def test_detect_small_objects_need_tiles(detector: Detector) -> None:
    spots = [square(16, 24), square(200, 96), square(504, 504), square(0, 0)]
    image = black(512, 512, *spots)
    assert whites(detector.detect(image)) == []
    assert whites(detector.detect(black(200, 200), tile=SIDE)) == []
    found = whites(detector.detect(image, tile=SIDE, overlap=0))
    assert found == sorted([*map(float, spot)] for spot in spots)


def test_detect_large_objects_come_from_the_whole_image(detector: Detector) -> None:
    big = square(128, 192, 64)  # a tile's size: a tile sees 64 squares in it, or parts of them
    image = black(512, 512, big, square(16, 24))
    detector.thresholds["detections_per_image"] = 200  # of a tile: two classes in 64 cells
    found = detector.detect(image, tile=SIDE, overlap=0)
    assert [128.0, 192.0, 192.0, 256.0] in whites(found)
    assert [16.0, 24.0, 24.0, 32.0] in whites(found)
    # Most of its pieces lie in the tile that it fills; those at the tile's border are cut, and go.
    inside = [box for box in whites(found) if box[0] >= 128 and box[2] <= 192]
    pieces = [box for box in inside if box != [128.0, 192.0, 192.0, 256.0]]
    assert len(pieces) == 6 * 6
    assert all(box[0] > 128 and box[2] < 192 and box[1] > 192 and box[3] < 256 for box in pieces)


# 104 = 64 + 40: with an overlap of .375 tiles start at 0, 40, 80, .. and share 24 pixels, three
# cells of the detector; an object of 8 pixels on the grid is whole in at least one tile.
@pytest.mark.parametrize("overlap", [0.375, 0.5])
def test_detect_object_on_any_border_or_corner_once(detector: Detector, overlap: float) -> None:
    step = 40 if overlap == 0.375 else 32
    side = SIDE + 3 * step
    windows = list(tile_windows((side, side), SIDE, overlap))
    assert [window[:2] for window in windows[:4]] == [(i * step, 0) for i in range(4)]
    for x, y in product((step - 8, step, SIDE, side - 8), repeat=2):
        image = black(side, side, square(x, y))
        assert whites(detector.detect(image, tile=SIDE, overlap=overlap)) == [
            [float(x), float(y), x + 8.0, y + 8.0]
        ]


def test_detect_in_tiles_of_odd_sizes(detector: Detector) -> None:
    for height, width in ((65, 64), (64, 200), (130, 71), (64, 65), (333, 129)):
        image = black(height, width, square(0, 0), square(width - 8, height - 8))
        found = whites(detector.detect(image, tile=SIDE, overlap=0.5))
        assert found == sorted([[0.0, 0.0, 8.0, 8.0], [width - 8.0, height - 8.0, width, height]])


def test_detect_image_no_larger_than_a_tile_as_without_tiles(
    detector: Detector, checkpoint: Checkpoint
) -> None:
    model: Any = checkpoint.model
    image = black(64, 60, square(8, 8))
    for tile in (64, 1000):
        model.batches.clear()
        found = detector.detect(image, tile=tile)
        assert len(model.batches) == 1
        assert isinstance(found, ImageDetections)
        plain = detector.detect(image)
        assert isinstance(plain, ImageDetections)
        assert torch.equal(found.boxes, plain.boxes)
        assert torch.equal(found.scores, plain.scores)


def test_stream_tiles_of_several_images_share_batches(
    detector: Detector, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model: Any = checkpoint.model
    spots = [[square(8 * i, 64)] for i in range(6)]
    sides = [(128, 128), (40, 40), (256, 64), (128, 192), (64, 64), (300, 100)]
    images: list[Any] = [
        black(h, w, *some) for (h, w), some in zip(sides, spots, strict=True) if h > 64
    ]
    small = [black(h, w) for h, w in sides if h <= 64]
    Image.fromarray(images[1]).save(tmp_path / "a.png")
    images[1] = tmp_path / "a.png"
    sources = [images[0], small[0], *images[1:3], "nowhere.png", small[1], images[3]]
    alone = [next(detector.stream([source], tile=SIDE, overlap=0.5)) for source in sources]
    windows = sum(shape[0] for shape in model.batches)
    for batch_size in (1, 7, 100):
        model.batches.clear()
        together = list(detector.stream(sources, tile=SIDE, overlap=0.5, batch_size=batch_size))
        counts = [shape[0] for shape in model.batches]
        assert sum(counts) == windows
        # A batch holds one padded size, and three windows have another than the rest: each is a
        # batch of its own and leaves one batch before it short.
        assert len(counts) <= -(-windows // batch_size) + 3
        for one, other in zip(alone, together, strict=True):
            if isinstance(one, Failure):
                assert isinstance(other, Failure)
            else:
                assert whites(other) == whites(one)
                assert isinstance(other, ImageDetections)
                assert other.size == one.size
    assert len(whites(together[0])) == 1


def test_stream_broken_image_in_tiles_is_a_single_failure(
    detector: Detector, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile")
    good = black(256, 256, square(64, 64))
    file = tmp_path / "broken.tif"
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    tifffile.imwrite(file, noise, tile=(64, 64), compression="deflate", photometric="rgb")
    content = bytearray(file.read_bytes())
    content[-3000:] = bytes(3000)
    file.write_bytes(content)
    for batch_size in (1, 5, 100):
        first, second, third = detector.stream(
            [good, file, good], tile=SIDE, overlap=0, batch_size=batch_size
        )
        assert whites(first) == whites(third) == [[64.0, 64.0, 72.0, 72.0]]
        assert isinstance(second, Failure)
        assert second.source == str(file)
        assert "cannot be read" in second.reason
    with pytest.raises(ImageError, match=r"broken\.tif"):
        detector.detect(file, tile=SIDE)
    # The whole is read first: it fails, and only what was read ahead goes through the network.
    model: Any = checkpoint.model
    model.batches.clear()
    list(detector.stream([file], tile=SIDE, workers=1))
    assert len(model.batches) <= 2


class _Broken(Windows):
    """A million million tiles, none of which can be read."""

    def __init__(self) -> None:
        self.size = (2**25, 2**25)

    def read(self, window: Window) -> torch.Tensor:
        raise ImageError("broken.tif: cannot be read")

    def reduced(self, height: int, width: int) -> torch.Tensor:
        return self.read((0, 0, width, height))


def test_stream_reads_no_further_tiles_of_a_broken_image(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = black(256, 256, square(64, 64))
    opened = Source.open_windows
    monkeypatch.setattr(
        Source, "open_windows", lambda one: _Broken() if one.name == "broken" else opened(one)
    )
    for batch_size in (1, 3, 100):
        sources = [Source(good, "good"), Source(good, "broken"), Source(good, "good")]
        streamed = detector.stream(sources, tile=SIDE, overlap=0, batch_size=batch_size)
        first, second, third = streamed
        assert whites(first) == whites(third) == [[64.0, 64.0, 72.0, 72.0]]
        assert isinstance(second, Failure)


def test_stream_failures_do_not_wait_for_a_full_batch(detector: Detector) -> None:
    streamed = detector.stream(repeat("nowhere.png"), batch_size=4)
    assert all(isinstance(one, Failure) for one in islice(streamed, 10))
    streamed = detector.stream(chain([black(64, 64)], repeat("nowhere.png")), batch_size=4)
    found, *failures = islice(streamed, 10)
    assert isinstance(found, ImageDetections)
    assert all(isinstance(one, Failure) for one in failures)


def test_detect_in_tiles_class_agnostic_and_limits(
    detector: Detector, checkpoint: Checkpoint
) -> None:
    spots = [square(x, y) for x, y in product(range(0, 512, 16), repeat=2)]
    image = black(512, 512, *spots)

    def count(one: Detector, **options: Any) -> int:
        found = one.detect(image, tile=SIDE, overlap=0, **options)
        assert isinstance(found, ImageDetections)
        return len(found)

    assert count(detector) == 2 * 32 * 32  # of 100 a tile: 16 squares in each
    assert count(detector, class_agnostic_nms=True) == 32 * 32
    assert count(detector, detections_per_image=70) == 70
    limited = Detector(
        checkpoint, device="cpu", precision="float32", image_size=64, detections_per_image=8
    )
    assert count(limited) == 8
    checkpoint.info["detect"]["detections_per_image"] = 8  # the model's own: of a tile
    own = Detector(checkpoint, device="cpu", precision="float32")
    assert count(own) == 8 * 64


def test_tile_auto_is_the_side_of_the_training_images(
    detector: Detector, checkpoint: Checkpoint
) -> None:
    model: Any = checkpoint.model
    image = black(130, 64)
    detector.detect(image, tile="auto", overlap=0, batch_size=100)
    assert sum(shape[0] for shape in model.batches) == 1 + 3  # 64 is the model's size
    model.batches.clear()
    checkpoint.info["image_side"] = 33
    detector.detect(image, tile="auto", overlap=0, batch_size=100)
    assert sum(shape[0] for shape in model.batches) == 1 + 4 * 2
    assert tile_side("auto", 512, {}) == 512
    assert tile_side("auto", 512, {"image_side": 256}) == 256
    assert tile_side("auto", 512, {"image_side": 8}) == MIN_TILE
    assert tile_side(700, 512, {"image_side": 8}) == 700
    for wrong in (None, "large", True, 0, float("nan"), float("inf")):
        with pytest.raises(
            ConfigError, match=r"image_side is no number of pixels: .* give --tile one"
        ):
            tile_side("auto", 512, {"image_side": wrong})


def test_tiling_defaults_to_that_of_training_on_tiles(
    detector: Detector, checkpoint: Checkpoint
) -> None:
    trained = {"tile": {"side": 48, "overlap": 0.5}, "image_side": 48}
    assert choose_tiling(None, None, 64, {}) == (None, 0.2)
    assert choose_tiling(None, None, 64, trained) == (48, 0.5)
    assert choose_tiling("auto", None, 64, trained) == (48, 0.5)
    assert choose_tiling("auto", 0.1, 64, {"image_side": 40}) == (40, 0.1)
    assert choose_tiling(32, 0, 64, trained) == (32, 0)
    assert choose_tiling("none", None, 64, trained) == (None, 0.5)
    for wrong in ("48", {"side": 48}, {"side": 7, "overlap": 0.2}, {"side": 48, "overlap": 2}):
        with pytest.raises(ConfigError):
            choose_tiling(None, None, 64, {"tile": wrong})
    model: Any = checkpoint.model
    checkpoint.info.update(trained)
    detector.detect(black(96, 48), batch_size=100)
    assert sum(shape[0] for shape in model.batches) == 1 + 3  # from 0, 24 and 48
    model.batches.clear()
    detector.detect(black(96, 48), tile="none")
    assert sum(shape[0] for shape in model.batches) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile 0 is neither auto, none nor 32 pixels or more"),
        ({"tile": 31}, "tile 31"),
        ({"tile": -64}, "tile -64"),
        ({"tile": True}, "tile True"),
        ({"tile": "big"}, "tile 'big'"),
        ({"tile": 64.5}, "tile 64.5"),
        ({"tile": 64, "overlap": 1}, r"overlap 1 is not in \[0, 1\)"),
        ({"tile": 64, "overlap": -0.1}, "overlap -0.1"),
        ({"tile": 64, "overlap": float("nan")}, "overlap nan"),
    ],
)
def test_tile_options_out_of_range_are_errors(
    detector: Detector, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        detector.detect(black(64, 64), **options)
    with pytest.raises(ConfigError, match=message):  # at once, not when the first is asked for
        detector.stream([], **options)


@pytest.mark.parametrize("overlap", [0, 0.1, 0.2, 0.5, 0.9])
def test_tile_windows_cover_the_image(overlap: float) -> None:
    for size in ((64, 65), (1000, 333), (129, 64), (640, 640), (7, 90)):
        height, width = size
        windows = list(tile_windows(size, SIDE, overlap))
        covered = np.zeros(size, np.int64)
        for x1, y1, x2, y2 in windows:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert (x2 - x1, y2 - y1) == (min(SIDE, width), min(SIDE, height))
            covered[y1:y2, x1:x2] += 1
        assert covered.min() >= 1
        assert len(set(windows)) == len(windows)
        for low, high in ((0, 2), (1, 3)):
            spans = sorted({(window[low], window[high]) for window in windows})
            for (_, end), (start, _) in pairwise(spans):
                assert end - start >= int(overlap * SIDE)
        assert windows == sorted(windows, key=lambda window: (window[1], window[0]))


def test_tile_windows_of_small_images() -> None:
    assert list(tile_windows((64, 64), SIDE, 0.2)) == []
    assert list(tile_windows((10, 64), SIDE, 0.2)) == []
    assert list(tile_windows((10, 65), SIDE, 0)) == [(0, 0, 64, 10), (1, 0, 65, 10)]
    assert len(list(tile_windows((128, 128), SIDE, 0))) == 4


LEFT, RIGHT = (0, 0, 64, 100), (64, 0, 128, 100)  # no overlap
SIZE = (100, 128)


def part(
    window: tuple[int, int, int, int] | None, *rows: tuple[float, ...], label: int = 0
) -> Part:
    """Rows of x1, y1, x2, y2 in pixels of the image, and score."""
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    x, y = (0, 0) if window is None else window[:2]
    boxes = values[:, :4] - torch.tensor([x, y, x, y])
    labels = torch.full((len(rows),), label)
    return Part(window, Detections(boxes, values[:, 4], labels))


def merged(*parts: Part, size: tuple[int, int] = SIZE, **options: Any) -> list[list[float]]:
    found = merge_parts(parts, size, nms_threshold=0.5, **options)
    assert (found.scores.diff() <= 0).all()
    rows = torch.cat([found.boxes, found.scores[:, None]], dim=1)
    return [[round(value, 3) for value in row] for row in rows.tolist()]


def test_merge_parts_drops_pieces_of_a_box_in_the_whole_image() -> None:
    whole = (30.0, 20.0, 100.0, 60.0, 0.7)
    pieces = part(LEFT, (30, 20, 64, 60, 0.9)), part(RIGHT, (64, 20, 100, 60, 0.8))
    assert merged(part(None, whole), *pieces) == [[30, 20, 100, 60, 0.7]]
    # Not to a box that is less sure (.66 / .9 = .73), nor to one of another class.
    unsure = part(None, (*whole[:4], 0.66))
    assert merged(unsure, pieces[0]) == [[30, 20, 64, 60, 0.9], [30, 20, 100, 60, 0.66]]
    unsure = part(None, (*whole[:4], 0.3))
    assert merged(unsure, *pieces) == [[30, 20, 100, 60, 0.85]]  # the pieces, joined
    other = part(None, whole, label=1)
    assert len(merged(other, *pieces)) == 2
    assert merged(other, *pieces, class_agnostic_nms=True) == [[30, 20, 100, 60, 0.7]]
    # A box that no border cuts stays, whatever it lies in: a small object on a large one.
    inner = part(LEFT, (35, 25, 50, 50, 0.5))
    assert len(merged(part(None, whole), inner)) == 2
    # The image's own border cuts nothing that another part could know.
    at_border = part(LEFT, (0, 0, 20, 40, 0.9))
    assert len(merged(part(None, (0, 0, 90, 60, 0.9)), at_border)) == 2


def test_merge_parts_drops_a_piece_of_a_box_in_the_next_tile() -> None:
    left, right = (0, 0, 64, 100), (40, 0, 104, 100)  # 24 pixels in common
    # An object of 20 pixels that ends 6 beyond the left tile.
    seen = part(right, (50, 10, 70, 30, 0.5))
    piece = part(left, (50, 10, 64, 30, 0.9))
    assert merged(piece, seen, size=(100, 104)) == [[50, 10, 70, 30, 0.5]]
    # Nor to a box that shows less of it than itself.
    less = part(right, (54, 10, 64, 30, 0.5))  # 200 of its 280 square pixels
    assert merged(piece, less, size=(100, 104)) == [[50, 10, 64, 30, 0.9]]
    # Another object that is near, of which no part of the piece is seen, takes nothing.
    assert len(merged(piece, part(right, (70, 10, 90, 30, 0.5)), size=(100, 104))) == 2


def test_merge_parts_joins_pieces_on_both_sides_of_a_border() -> None:
    pieces = part(LEFT, (30, 20, 64, 60, 0.9)), part(RIGHT, (64, 22, 100, 60, 0.7))
    # 38 of 40 pixels are shared; the score is the mean.
    assert merged(*pieces) == [[30, 20, 100, 60, 0.8]]
    # Half of the length: two objects that touch the seam, 20 of 40 pixels.
    apart = part(LEFT, (30, 20, 64, 40, 0.9)), part(RIGHT, (64, 20, 100, 60, 0.7))
    assert len(merged(*apart)) == 2
    # Neither does a box that ends before the seam belong to one beyond it.
    away = part(LEFT, (30, 20, 60, 60, 0.9)), part(RIGHT, (64, 20, 100, 60, 0.7))
    assert len(merged(*away)) == 2
    # Other classes do not meet, but where classes do not count.
    mixed = pieces[0], part(RIGHT, (64, 22, 100, 60, 0.7), label=1)
    assert len(merged(*mixed)) == 2
    assert len(merged(*mixed, class_agnostic_nms=True)) == 1


def test_merge_parts_joins_four_tiles_and_chains() -> None:
    size = (128, 128)
    corners = [(x, y, x + 64, y + 64) for y in (0, 64) for x in (0, 64)]
    quarters = [
        part(w, (max(40, w[0]), max(50, w[1]), min(90, w[2]), min(80, w[3]), 0.8)) for w in corners
    ]
    assert merged(*quarters, size=size) == [[40, 50, 90, 80, 0.8]]
    assert merged(*quarters[::-1], size=size) == [[40, 50, 90, 80, 0.8]]
    row = [(x, 0, x + 64, 64) for x in (0, 64, 128)]
    chain = [
        part(w, (max(40, w[0]), 10, min(150, w[2]), 50, score))
        for w, score in zip(row, (0.8, 0.6, 0.5), strict=True)
    ]
    # (.8 + .6) / 2 = .7, then (.7 + .5) / 2 = .6
    assert merged(*chain, size=(64, 192)) == [[40, 10, 150, 50, 0.6]]


def test_merge_parts_joins_a_piece_only_once() -> None:
    # Two that would both fit: the better one takes it.
    left = part(LEFT, (30, 20, 64, 60, 0.9), (20, 24, 64, 60, 0.8))
    right = part(RIGHT, (64, 20, 100, 60, 0.7))
    found = merged(left, right)
    assert [30, 20, 100, 60, 0.8] in found
    assert len(found) <= 2


def test_merge_parts_without_cut_boxes_is_nms() -> None:
    """Against a plain loop: boxes well inside of their parts."""
    rng = np.random.default_rng(0)
    windows = [None, LEFT, RIGHT]
    parts, rows = [], []
    for window in windows:
        x1, y1, x2, y2 = window or (0, 0, 128, 100)
        for label in (0, 1):
            made = []
            for _ in range(30):
                x, y = rng.uniform(x1 + 3, x2 - 33), rng.uniform(y1 + 3, y2 - 33)
                w, h = rng.uniform(10, 30, 2)
                made.append((x, y, x + w, y + h, float(rng.random())))
                rows.append((*made[-1], label))
            parts.append(part(window, *made, label=label))
    found = merge_parts(parts, SIZE, nms_threshold=0.3)
    kept: list[tuple[float, ...]] = []
    for row in sorted(rows, key=lambda row: -row[4]):
        if all(row[5] != other[5] or iou(row, other) <= 0.3 for other in kept):
            kept.append(row)
    assert found.labels.tolist() == [row[5] for row in kept]
    torch.testing.assert_close(
        found.boxes, torch.tensor([row[:4] for row in kept], dtype=torch.float32)
    )
    assert len(merge_parts(parts, SIZE, nms_threshold=0.3, max_detections=5)) == 5


def iou(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, wide) * max(0.0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def test_evaluate_in_tiles(detector: Detector, tmp_path: Path) -> None:
    images = []
    for number, spots in enumerate(([square(16, 24), square(200, 96)], [square(64, 64)])):
        file = tmp_path / f"{number}.png"
        Image.fromarray(black(512, 512, *spots)).save(file)
        objects = tuple(
            Annotation((float(a), float(b), float(c), float(d)), label)
            for a, b, c, d in spots
            for label in (0, 1)
        )
        images.append(LabelledImage(file, number, objects, 512, 512))
    dataset = Dataset(tuple(images), ("white", "bright"), (7, 9), "val", "coco", tmp_path)
    assert evaluate(detector, dataset).ap == 0
    done: list[int] = []
    metrics = evaluate(
        detector, dataset, tile=SIDE, overlap=0, progress=lambda now, _: done.append(now)
    )
    assert metrics.ap == 1
    assert metrics.loss is None
    assert metrics.detections == 6
    assert done == [1, 2]
    # A limit that is given holds for the image; the detector's own for a tile.
    options: dict[str, Any] = {"tile": SIDE, "overlap": 0, "detections_per_image": 1}
    assert evaluate(detector, dataset, **options).detections == 2


def test_draw_large_image_is_reduced(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = black(800, 1200, square(400, 200, 160))
    Image.fromarray(image).save(tmp_path / "a.bmp")
    found = detector.detect(tmp_path / "a.bmp", tile=400, overlap=0)
    assert isinstance(found, ImageDetections)
    assert found.draw().size == (1200, 800)
    monkeypatch.setattr("retinanet.inference.detections.DRAWN_PIXELS", 600 * 400)
    drawn = np.asarray(found.draw())
    assert drawn.shape == (400, 600, 3)
    assert (drawn[110:170, 210:270] > 0).mean() > 0.8  # the square in its place, boxes on it
    assert (drawn[:80] == 0).all()
    monkeypatch.setattr("retinanet.inference.detections.CAPTIONED", 0)
    assert np.asarray(found.draw()).any()
    assert found.boxes.max() > 400  # those of the whole


def test_stream_of_endless_images_in_tiles(detector: Detector) -> None:
    images = repeat(black(128, 128, square(8, 8)))
    for found in islice(detector.stream(images, tile=SIDE, overlap=0), 5):
        assert whites(found) == [[8.0, 8.0, 16.0, 16.0]]


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from white_finder import WhiteFinder
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint

info = {"detect": {"score_threshold": 0.5}}
made = Checkpoint(WhiteFinder(), ("white", "bright"), (7, 9), 64, 128, info)
detector = Detector(made, device="cpu", precision="float32")
for file in sys.argv[2:]:
    (found,) = detector.stream([file], tile=1000, batch_size=2, workers=2)
    print(len(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_stream_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    white = black(512, 512, (0, 0, 256, 256))
    for side in (2048, 10_240):  # 12 and 315 MB of pixels
        tiles = (white if i == 0 else black(512, 512) for i in range((side // 512) ** 2))
        tifffile.imwrite(
            tmp_path / f"{side:05d}.tif", tiles, shape=(side, side, 3), dtype=np.uint8,
            tile=(512, 512), photometric="rgb", compression="deflate",
        )  # fmt: skip
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parents[1])]
    files = map(str, sorted(tmp_path.glob("*.tif")))
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    (objects, small), (more, large) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert min(objects, more) > 0
    # 64 MiB of pieces are kept, and a row of them.
    assert large - small < 150
