"""From an image of any kind to what is found in it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retinanet.errors import ConfigError, DataError, ImageError, WeightsError
from retinanet.inference import Detector, Failure, ImageDetections, load
from retinanet.inference.tiles import merge_parts
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.structures import Outputs
from tiny_backbone import tiny_network
from white_finder import Pixels, WhiteFinder, black

SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "float32"}

BOX = [32.0, 16.0, 48.0, 32.0]


def one(found: ImageDetections | list[ImageDetections]) -> ImageDetections:
    assert isinstance(found, ImageDetections)
    return found


def several(found: ImageDetections | list[ImageDetections]) -> list[ImageDetections]:
    assert isinstance(found, list)
    return found


def test_detect_boxes_are_in_pixels_of_the_original_image(
    detector: Detector, square: Pixels
) -> None:
    found = one(detector.detect(square))
    # White before bright: best first, and both, as NMS is a class's own.
    torch.testing.assert_close(found.boxes, torch.tensor([BOX, BOX]))
    # sigmoid of 5.5 and 3.5, less what the square loses at its edge when it is halved.
    assert 0.97 < found.scores[0] < 0.996
    assert 0.86 < found.scores[1] < 0.971
    assert found.labels.tolist() == [0, 1]
    assert found.classes == ("white", "bright")
    assert found.size == (128, 192)
    assert len(found) == 2
    (box, score, label), _ = found
    assert box.tolist() == BOX
    assert (score, label) == (float(found.scores[0]), 0)


def test_detector_is_printed_and_called(detector: Detector, square: Pixels) -> None:
    assert repr(detector).startswith("Detector(white, bright; images of 64 px; torch on cpu, floa")
    assert torch.equal(one(detector(square)).boxes, one(detector.detect(square)).boxes)


def test_detect_of_some_classes_names_the_argument_of_load(detector: Detector) -> None:
    with pytest.raises(ConfigError, match=r"classes are chosen with rn\.load\(.*classes="):
        detector.detect(black(64, 64), classes=["white"])  # type: ignore[call-arg]


def test_detect_with_value_range_scales_pixels_of_other_ranges(
    detector: Detector, square: Pixels, tmp_path: Path
) -> None:
    deep = square.astype(np.int32) * 16  # of a 12-bit camera
    expected = one(detector.detect(square))
    found = one(detector.detect(deep, value_range=(0, 4080)))
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert found.draw().tobytes() == expected.draw().tobytes()
    tiled = one(detector.detect(deep, tile=64, value_range=(0, 4080)))
    assert torch.equal(tiled.boxes, one(detector.detect(square, tile=64)).boxes)
    with pytest.raises(
        ImageError, match=r"ambiguous value range: int32 values from .*value_range="
    ):
        detector.detect(deep)
    with pytest.raises(ConfigError, match=r"invalid value_range: \(1, 0\)"):
        detector.detect(square, value_range=(1, 0))


def test_detect_folder_glob_list_and_batch_give_lists(
    detector: Detector, folder: Path, square: Pixels
) -> None:
    expected = ["a.png", "left/a.png", "right/a.png"]
    assert [found.name for found in several(detector.detect(folder))] == expected
    assert len(several(detector.detect(str(folder / "*.png")))) == 1
    assert len(several(detector.detect([folder / "a.png"]))) == 1
    assert len(several(detector.detect(np.stack([square] * 3), batch_size=2))) == 3
    assert detector.detect([]) == []


def test_stream_batches_have_batch_size_readable_images(
    detector: Detector, checkpoint: Checkpoint, square: Pixels
) -> None:
    model: Any = checkpoint.model
    detector.detect([square] * 5, batch_size=2)
    assert [shape[0] for shape in model.batches] == [2, 2, 1]
    assert model.batches[0] == (2, 3, 64, 96)
    # What cannot be read takes no place in a batch.
    model.batches.clear()
    list(detector.stream([square, "nowhere.png", square, square], batch_size=2))
    assert [shape[0] for shape in model.batches] == [2, 1]


def test_detect_rotated_by_exif_is_upright(
    detector: Detector, tmp_path: Path, square: Pixels
) -> None:
    file = tmp_path / "turned.png"
    image = Image.fromarray(square)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise, for showing
    image.save(file, exif=exif)
    found = one(detector.detect(file))
    assert found.size == (192, 128)
    # (x, y) of 192 x 128 goes to (128 - y, x).
    assert found.boxes[0].tolist() == [128 - 32.0, 32.0, 128 - 16.0, 48.0]


def test_detector_image_size_scales_max_size(checkpoint: Checkpoint, square: Pixels) -> None:
    model: Any = checkpoint.model
    detector = Detector(checkpoint, device="cpu", image_size=128)
    assert detector.max_size == 256  # grown with it
    found = one(detector.detect(square))
    assert model.batches[-1] == (1, 3, 128, 192)
    assert len(found) == 8  # four cells of two classes
    assert Detector(checkpoint, device="cpu", image_size=128, max_size=150).max_size == 150


def test_detector_default_score_threshold_is_for_people() -> None:
    def thresholds(stored: dict[str, Any], **given: Any) -> tuple[Any, Any]:
        model: Any = WhiteFinder()
        checkpoint = Checkpoint(model, ("white", "bright"), (7, 9), 64, 128, {"detect": stored})
        detector = Detector(checkpoint, **SETTINGS, **given)
        return tuple(
            (chosen["score_threshold"], dict(chosen["score_thresholds"]))
            for chosen in (detector.thresholds, detector.eval_thresholds)
        )

    own = {"white": 0.6, "bright": 0.2}
    assert thresholds({}) == ((0.3, {}), (0.05, {}))
    assert thresholds({"score_threshold": 0.01}) == ((0.3, {}), (0.01, {}))
    assert thresholds({"score_threshold": 0.5}) == ((0.5, {}), (0.5, {}))
    assert thresholds({"score_thresholds": own}) == ((0.3, own), (0.05, {}))
    assert thresholds({"score_thresholds": own}, score_threshold=0.1) == ((0.1, {}), (0.1, {}))
    assert thresholds({}, score_thresholds=own) == ((0.3, own), (0.05, own))


def test_detect_score_thresholds_by_class(checkpoint: Checkpoint, square: Pixels) -> None:
    # Scores of .996 (white) and .971 (bright).
    checkpoint.info["detect"] = {"score_thresholds": {"bright": 0.98}}
    detector = Detector(checkpoint, **SETTINGS)
    assert one(detector.detect(square)).labels.tolist() == [0]
    assert one(detector.detect(square, score_threshold=0.5)).labels.tolist() == [0, 1]
    given = {"white": 0.999, "bright": 0.5}
    assert one(detector.detect(square, score_thresholds=given)).labels.tolist() == [1]
    assert one(Detector(checkpoint, **SETTINGS, score_threshold=0.1).detect(square)).labels.tolist()
    with pytest.raises(ConfigError, match=r"the model lacks: 'brigth'; .*did you mean bright"):
        Detector(checkpoint, **SETTINGS, score_thresholds={"brigth": 0.5})
    with pytest.raises(ConfigError, match=r"detect\.score_thresholds"):
        Detector(checkpoint, **SETTINGS, score_thresholds={"bright": 1.5})


def test_detect_temperature_calibrates_scores(checkpoint: Checkpoint, square: Pixels) -> None:
    plain = one(Detector(checkpoint, **SETTINGS).detect(square))
    found = one(Detector(checkpoint, **SETTINGS, temperature=2.0).detect(square))
    torch.testing.assert_close(found.scores, (plain.scores.logit() / 2).sigmoid())
    assert torch.equal(found.boxes, plain.boxes)


def test_detect_flip_tta_merges_mirrored_boxes_before_nms(checkpoint: Checkpoint) -> None:
    class LeftFinder(WhiteFinder):
        """Sees the left half of its input only."""

        def forward(self, images: Tensor) -> Outputs:
            outputs = super().forward(images)
            for logits in outputs.logits:
                logits[..., logits.shape[-1] // 2 :] = -10
            return outputs

    model: Any = LeftFinder()
    own = Checkpoint(model, checkpoint.classes, checkpoint.category_ids, 64, 128, checkpoint.info)
    detector = Detector(own, **SETTINGS)
    # A square at the left and another at the right; 90 pixels are padded to 96.
    image = black(64, 88, (8, 8, 16, 16), (72, 40, 80, 48))
    left, right = [8.0, 8, 16, 16], [72.0, 40, 80, 48]
    assert one(detector.detect(image)).boxes.tolist() == [left] * 2
    found = one(detector.detect(image, flip_tta=True))
    assert sorted(found.boxes.tolist()) == [left] * 2 + [right] * 2
    assert model.batches[-2:] == [(1, 3, 64, 96)] * 2
    # What both passes see is there once.
    detector = Detector(checkpoint, **SETTINGS)
    assert one(detector.detect(image, flip_tta=True)).boxes.tolist() == [left, right] * 2


def test_detect_thresholds_of_call_detector_and_checkpoint(
    checkpoint: Checkpoint, square: Pixels
) -> None:
    detector = Detector(checkpoint, device="cpu", precision="float32")
    assert detector.thresholds["score_threshold"] == 0.5
    assert detector.thresholds["topk_candidates"] == 1000  # the paper's, where nothing is said
    assert len(one(detector.detect(square, score_threshold=0.95))) == 1
    assert len(one(detector.detect(square, class_agnostic_nms=True))) == 1
    assert len(one(detector.detect(square, detections_per_image=1))) == 1
    assert len(one(detector.detect(square, topk_candidates=1))) == 1
    assert len(one(detector.detect(square))) == 2
    strict = Detector(checkpoint, device="cpu", precision="float32", score_threshold=0.95)
    assert len(one(strict.detect(square))) == 1
    assert len(one(strict.detect(square, score_threshold=0.5))) == 2


def test_detector_with_classes_detects_only_these(checkpoint: Checkpoint, square: Pixels) -> None:
    detector = Detector(checkpoint, device="cpu", precision="float32", classes=["bright"])
    assert (detector.classes, detector.selected) == (("white", "bright"), (1,))
    found = one(detector.detect(square, class_agnostic_nms=True, detections_per_image=1))
    assert found.labels.tolist() == [1]
    assert one(detector.detect(square, tile=96)).labels.tolist() == [1]
    with pytest.raises(ConfigError, match=r"unknown class 'brigt'.*did you mean bright\?"):
        Detector(checkpoint, device="cpu", classes=["white", "brigt"])


def test_another_kind_of_nms_has_the_threshold_of_the_paper(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.info["detect"] |= {"nms": "wbf", "nms_threshold": 0.7}
    options: dict[str, Any]
    for options, expected in (
        ({}, 0.7),
        ({"nms": "wbf"}, 0.7),
        ({"nms": "hard"}, 0.5),
        ({"nms": "hard", "nms_threshold": 0.6}, 0.6),
    ):
        detector = Detector(checkpoint, device="cpu", precision="float32", **options)
        assert detector.thresholds["nms_threshold"] == expected
        assert detector.eval_thresholds["nms_threshold"] == expected
    used: list[float] = []

    def merge(*parts: Any, nms_threshold: float, **others: Any) -> Any:
        used.append(nms_threshold)
        return merge_parts(*parts, nms_threshold=nms_threshold, **others)

    monkeypatch.setattr("retinanet.inference.detector.merge_parts", merge)
    for options in ({}, {"nms": "hard", "nms_threshold": 0.6}):
        Detector(checkpoint, device="cpu", precision="float32").detect(
            black(128, 128), tile=64, **options
        )
    assert used == [0.5, 0.6]


def test_nms_threshold(detector: Detector) -> None:
    # Two white cells side by side do not overlap: only at an IoU of 0 would one go. Boxes here are
    # disjoint by construction, so the class-agnostic pair is the one that NMS can act on.
    image = black(64, 64, (0, 0, 8, 8))
    assert len(one(detector.detect(image, class_agnostic_nms=True, nms_threshold=0.5))) == 1
    assert len(one(detector.detect(image, class_agnostic_nms=True, nms_threshold=1.0))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, r"detect.score_threshold: .* \(got 1.5\)"),
        ({"nms_threshold": 0}, "detect.nms_threshold"),
        ({"detections_per_image": 0}, "detect.detections_per_image"),
        ({"topk_candidates": 0}, "detect.topk_candidates"),
        ({"score_treshold": 0.5}, "unknown setting .*did you mean detect.score_threshold"),
        ({"image_size": 8}, "data.image_size"),
        ({"max_size": 8}, "data.max_size"),
        ({"precision": "half"}, "precision 'half'"),
        ({"device": "gpu"}, "device 'gpu'"),
    ],
)
def test_detector_invalid_options_are_errors(
    checkpoint: Checkpoint, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Detector(checkpoint, **{"device": "cpu", **options})


def test_detect_options_out_of_range_are_errors(detector: Detector, square: Pixels) -> None:
    with pytest.raises(ConfigError, match="score_threshold"):
        detector.detect(square, score_threshold=-1)
    with pytest.raises(ConfigError, match="batch_size 0"):
        detector.detect(square, batch_size=0)


def test_detect_unreadable_sources_are_errors(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    for missing in ("nowhere.jpg", str(tmp_path / "*.jpg")):
        with pytest.raises(DataError, match="no "):
            detector.detect(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        detector.detect(tmp_path / "empty")
    with pytest.raises(DataError, match="unknown type of source: float"):
        detector.detect(1.5)
    broken = folder / "broken.png"
    broken.write_bytes((folder / "a.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"broken\.png"):
        detector.detect(broken)
    with pytest.raises(ImageError, match=r"broken\.png"):
        detector.detect(folder)


def test_stream_continues_after_unreadable_images(
    detector: Detector, folder: Path, square: Pixels
) -> None:
    broken = folder / "left" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no more of this")
    sources = [square, broken, folder, "nowhere.png", None, square, np.zeros((2, 3, 4), "U1")]
    for batch_size in (1, 2, 3, 100):
        results = list(detector.stream(sources, batch_size=batch_size))
        outcome = [one.source if isinstance(one, Failure) else one.name for one in results]
        assert outcome[0] == "image_000000"
        assert outcome[1] == str(broken)
        assert outcome[-4:] == ["nowhere.png", "image_000004", "image_000005", "image_000006"]
        failed = [one for one in results if isinstance(one, Failure)]
        assert len(failed) == 5  # `broken` alone and again in its folder
        assert len(results) - len(failed) == 5
        assert str(broken) in failed[0].reason
        assert all("\n" not in one.reason for one in failed)
        assert failed[0].to_dict() == {"file": str(broken), "reason": failed[0].reason}


def test_stream_reports_any_error_of_a_decoder(
    detector: Detector, square: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([MemoryError("of all\nmemory"), None])

    def read(*_: Any, value_range: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        error = next(calls)
        if error is not None:
            raise error
        return torch.zeros(3, 64, 64, dtype=torch.uint8), (64, 64)

    monkeypatch.setattr("retinanet.inference.sources.read_reduced", read)
    first, second = detector.stream(["pyproject.toml", "pyproject.toml"], workers=1)
    assert isinstance(first, Failure)
    assert first.reason == "pyproject.toml: MemoryError: of all memory"
    assert isinstance(second, ImageDetections)


def test_stream_raises_errors_of_the_network(
    detector: Detector, checkpoint: Checkpoint, square: Pixels
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the network")

    checkpoint.model.forward = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the network"):
        list(detector.stream([square]))


def test_stream_without_images_is_an_error_at_once(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image in this folder"):
        detector.stream(tmp_path)
    assert list(detector.stream([])) == []


def test_stream_memory_is_flat(detector: Detector) -> None:
    taken = 0
    gone: list[None] = []

    def images() -> Iterator[Pixels]:
        nonlocal taken
        while True:  # endless: only what is read ahead may be asked for
            taken += 1
            image = black(64, 64)
            weakref.finalize(image, gone.append, None)
            yield image

    stream = detector.stream(images(), batch_size=3, workers=2)
    most = 0
    for _ in range(60):
        next(stream)
        most = max(most, taken - len(gone))
    # At the most a batch in the network, and ahead of it another batch and one a thread.
    assert taken <= 60 + 3 + (3 + 2) + 1
    assert most <= 3 + (3 + 2) + 2
    stream.close()  # type: ignore[attr-defined]


def test_threads_end_with_the_stream(detector: Detector, square: Pixels) -> None:
    stream = detector.stream([square] * 50, workers=3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("read-image")]


def test_load_and_detect_with_a_real_network(tmp_path: Path) -> None:
    model = tiny_network(backbone="mobilenet_v2")
    saved = Checkpoint(model, ("a", "b"), (3, 5), 64, 96, {})
    save_checkpoint(tmp_path / "run" / "best", saved)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 151, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    for precision in ("float32", "auto"):
        detector = load(tmp_path / "run", "cpu", precision=precision, score_threshold=0.0)
        assert not detector.model.training
        found = one(detector.detect(tmp_path / "noise.png"))
        assert 0 < len(found) <= 100
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([151.0, 90, 151, 90])).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        # The prior: an untrained network gives every anchor about .01.
        assert 0.005 < float(found.scores.median()) < 0.05
    assert len(one(detector.detect(pixels, score_threshold=0.5))) == 0


def test_load_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_detections_of_an_image_do_not_depend_on_its_batch() -> None:
    model = tiny_network(1)
    torch.nn.init.normal_(model.class_head.last.weight, std=1.0)
    checkpoint = Checkpoint(model, ("a",), (0,), 64, 96)
    detector = Detector(checkpoint, device="cpu", precision="float32", score_threshold=0.02)
    random = np.random.default_rng(0)
    sizes = [(64, 64), (64, 96), (96, 64), (60, 64), (64, 90), (260, 100), (500, 11)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for alone, joined in zip(
        several(detector.detect(images)),
        several(detector.detect(images, batch_size=7)),
        strict=True,
    ):
        assert len(alone) == len(joined) > 10
        torch.testing.assert_close(alone.scores, joined.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.boxes, joined.boxes, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("model", [None, torch.nn.Identity()])
def test_load_of_what_is_no_name_is_an_error(model: Any) -> None:
    with pytest.raises(WeightsError, match=r"loaded by its path or name, got (NoneType|Identity)"):
        load(model)
